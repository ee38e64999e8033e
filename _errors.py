"""Base classes of the package's errors, and helpers that keep a message on one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class RequestError(ValueError):
    """Invalid request: an argument, a file or a model that does not fit. Nothing was done. The message is one line."""


class ResultError(Exception):
    """The work was done, and its result cannot be used. The message is one line."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return what to append to "unknown NAME": close names, or all names when none is close."""
    known = sorted(known)
    close = get_close_matches(name, known, n=3, cutoff=0.6) or [k for k in known if k.startswith(name)][:3]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(known)}" if len(known) <= 30 else ""


def first_line(error: BaseException) -> str:
    """Return the first line of the message that is not empty, or the name of the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[0]) if lines else type(error).__name__


def printable(text: str) -> str:
    """Return text as one line for any terminal: control characters and invalid Unicode are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
