"""The pages of the documentation as tests read them: blocks of code, commands, links."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)|<(https?://[^>\s]+)>")
_NAMED = re.compile(r"`([\w./-]+/[\w./-]*\.(?:py|md|txt|cfg|toml|yml))`")


def name_of(page: Path) -> str:
    """Return the path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the blocks of code of a page in order: language and code, without the indent of a list."""
    found = []
    for match in _FENCE.finditer(page.read_text(encoding="utf-8")):
        lines = (line.removeprefix(match["indent"]) for line in match["code"].splitlines(keepends=True))
        found.append((match["language"], "".join(lines)))
    return found


def commands(page: Path) -> list[str]:
    """Return the `foveate` commands of a page, of fenced and indented blocks, each in one line, without comments."""
    text = page.read_text(encoding="utf-8")
    fenced = [code for language, code in blocks(page) if language in ("sh", "bash", "text")]
    indented = [match[0] for match in re.finditer(r"(?:^    .*\n)+", _FENCE.sub("", text), re.MULTILINE)]
    lines = "\n".join(re.sub(r"^    (?! )", "", code, flags=re.MULTILINE) for code in (*fenced, *indented))
    lines = re.sub(r"\\\n\s*|\n {4,}(?=\[)", " ", lines)
    found = re.findall(r"^(?:\S+=\S* )*(?:.* )?(foveate (?!\{)[a-z].*)$", lines, re.MULTILINE)
    return [re.sub(r"\s+#.*$|\s*>.*$", "", line) for line in found]


def links(page: Path) -> list[str]:
    """Return the targets of all links of a page, but of those in code."""
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))
    return [first or second for first, second in _LINK.findall(text)]


def named_files(page: Path) -> list[str]:
    """Return the files of the repository that a page names in code, but for placeholders in capitals."""
    named = _NAMED.findall(page.read_text(encoding="utf-8"))
    return [path for path in named if not re.search(r"\b[A-Z]+\b(?<!README)(?<!CHANGELOG)", path)]
