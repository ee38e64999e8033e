"""Refuse a path that cannot be written, before any work is done."""

from pathlib import Path

from .errors import ExportError


def check_target(out: Path, suffix: str) -> None:
    """Refuse a path that cannot become a file with this suffix."""
    if out.suffix != suffix:
        raise ExportError(f"{out}: wanted a file name that ends in {suffix}")
    if out.is_dir():
        raise ExportError(f"{out} is a folder, wanted a file name")
    _check_parent(out)


def check_empty_folder(out: Path) -> None:
    """Refuse a path that exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty folder; remove it or choose another name")
    _check_parent(out)


def _check_parent(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise ExportError(f"{out}: the folder {out.parent} does not exist")
