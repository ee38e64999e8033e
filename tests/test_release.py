"""One version everywhere, extras as the page says, a short README, and a CI that builds the site."""

import re
from configparser import ConfigParser
from datetime import date

import yaml
from packaging.requirements import Requirement
from pages import DOCS, ROOT

import foveate

SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def test_version_and_date_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    top = re.search(r"^## (\S+) \((\S+)\)$", changelog, re.MULTILINE)
    assert top is not None
    assert (top[1], date.fromisoformat(top[2])) == (citation["version"], citation["date-released"])
    assert citation["version"] == foveate.__version__


def test_every_section_of_the_changelog_has_entries():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.split(r"^### ", changelog, flags=re.MULTILINE)[1:]
    assert [text.partition("\n")[0] for text in sections[:3]] == ["Added", "Changed", "Fixed"]
    assert min(text.count("\n- ") for text in sections) > 0


def test_the_table_of_extras_is_that_of_the_package():
    """Packages without versions, in the order of setup.cfg."""
    declared = {
        extra: [Requirement(line).name for line in lines.split("\n") if line]
        for extra, lines in SETUP["options.extras_require"].items()
    }
    lines = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", (DOCS / "install.md").read_text(), re.MULTILINE)
    assert {extra: packages.split(", ") for extra, packages, _ in lines} == declared
    assert [extra for extra, *_ in lines] == list(declared)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 80


def test_ci_builds_the_site_before_the_tests():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").strip().splitlines()
    build = next(i for i, line in enumerate(script) if line.startswith("mkdocs build --strict"))
    install = next(i for i, line in enumerate(script) if line.startswith("pip install"))
    assert install < build < len(script) - 1 and script[-1] == "pytest -n 2"
    assert "docs" in re.findall(r"\.\[([\w,]+)\]", script[install])[0].split(",")
