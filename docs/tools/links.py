"""Links between files of the repository, as links between pages of the site."""

import posixpath
import re

PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
RESULTS = "benchmarks/results"
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s]+)(?=\))")


def to_site(markdown: str, source: str, page: str) -> str:
    """Rewrite the links of a page.

    Args:
        markdown: text of the page.
        source: path of the file in the repository, such as "docs/ops.md".
        page: path of the page below docs/, such as "ops.md".
    """

    def rewrite(found: re.Match[str]) -> str:
        path, mark, anchor = found[1].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target == RESULTS:
            target = "results.md"
        elif target.startswith(f"{RESULTS}/"):
            name = posixpath.basename(target)
            target, mark, anchor = "results.md", "#", re.sub(r"[^\w-]", "", name)
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif target in PAGES:
            target = PAGES[target]
        else:
            return found[1]
        return posixpath.relpath(target, posixpath.dirname(page) or ".") + mark + anchor

    return _LINK.sub(rewrite, markdown)
