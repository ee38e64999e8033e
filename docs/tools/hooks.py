"""What MkDocs calls while it builds the site: figures, pages that are files of the repository, generated content."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import page_tables as tables
from content import fill
from figures import FIGURES
from links import PAGES, to_site
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from panels import draw

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
SOURCES = {page: source for source, page in PAGES.items() if source != "README.md"}  # generated pages


_folder = TemporaryDirectory()


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: "MkDocsConfig") -> "MkDocsConfig":
    """Let mkdocstrings find the package: the repository's folder may have any name."""
    link = Path(_folder.name) / "foveate"
    if not link.exists():  # `mkdocs serve` builds again and again
        link.symlink_to(ROOT)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_folder.name]
    return config


def on_shutdown() -> None:
    _folder.cleanup()


def on_files(files: Files, config: "MkDocsConfig") -> Files:
    """Add the figures, and the pages that are files of the repository."""
    for name, panels in FIGURES.items():
        files.append(File.generated(config, f"figures/{name}.svg", content=draw(panels())))
    for page, source in SOURCES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "results.md", content=tables.results()))
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: Files) -> str:
    """Put generated content in, and make links to files of the repository links to pages."""
    here = page.file.src_uri
    return fill(to_site(markdown, SOURCES.get(here, f"docs/{here}"), here), here)
