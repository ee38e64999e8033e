"""Refuse a path that cannot be written, before any work is done, and write there atomically."""

from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path

from .._files import atomic_path, why_not_writable
from .errors import ExportError, MissingExtraError

_BESIDE = {".xml": ".bin"}  # suffix of a file -> of the second file that is written with it


def require_packages(extra: str, *packages: str) -> None:
    """Raise a MissingExtraError with the install command if one of the packages is not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise MissingExtraError(f'needs {", ".join(missing)}: pip install "foveate[{extra}]"')


def atomic_files(out: Path) -> AbstractContextManager[Path]:
    """Return `atomic_path` for an exported file and what is written beside it: the weights of OpenVINO IR."""
    return atomic_path(out, beside=_BESIDE.get(out.suffix))


def check_target(out: Path, suffix: str) -> None:
    """Refuse a path that cannot become a file with this suffix."""
    if out.suffix != suffix:
        raise ExportError(f"{out}: wanted a file name that ends in {suffix}")
    if out.is_dir():
        raise ExportError(f"{out} is a folder, wanted a file name")
    if suffix in _BESIDE and (beside := out.with_suffix(_BESIDE[suffix])).exists() and not out.exists():
        raise ExportError(f"{out}: its weights would replace {beside}, a file of something else; choose another name")
    _check_parent(out)


def check_empty_folder(out: Path) -> None:
    """Refuse a path that exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty folder; remove it or choose another name")
    _check_parent(out)


def _check_parent(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise ExportError(f"{out}: the folder {out.parent} does not exist")
    if (why := why_not_writable(out.absolute().parent)) is not None:
        raise ExportError(f"{out}: {why}")
