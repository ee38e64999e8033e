"""What the messages of all rooms share: one line, and a hint at the name that was meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return what to append to "unknown NAME": the close names, or all of them where none is close."""
    known = sorted(known)
    close = get_close_matches(name, known, n=3, cutoff=0.6) or [k for k in known if k.startswith(name)][:3]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(known)}" if len(known) <= 30 else ""


def first_line(error: BaseException) -> str:
    """Return the first line that says something, or the error's type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[0]) if lines else type(error).__name__


def printable(text: str) -> str:
    """Return text as one line for any terminal: control characters and what is not Unicode are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
