"""Run timm's own tests/test_models.py, of the installed timm version, against foveate's models.

    python tests/acceptance/run_timm_tests.py                              every model of ours
    python tests/acceptance/run_timm_tests.py --models 'nat_*' van_b0      some
    python tests/acceptance/run_timm_tests.py --models van_b0 -k forward -n 4

The tests come from timm's source distribution (its wheel has none), fetched once by pip and kept in the user's cache.
`timm_plugin.py` beside this file shows them our models in place of timm's. Exits 0 only when tests ran and all passed.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent


def timm_tests() -> Path:
    """Return the folder that holds tests/ and pyproject.toml of the installed timm, fetching them when absent.

    Raises:
        RuntimeError: pip could not download the source distribution.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foveate"
    folder = cache / f"timm-{version('timm')}-tests"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as scratch:
            _extract(_download(Path(scratch)), Path(scratch) / "new")
            _move(Path(scratch) / "new", folder)
    return folder


def run(models: Sequence[str] = ("*",), select: str = "", workers: int = 0) -> int:
    """Run the tests in a process of their own and return its exit code.

    Args:
        models: patterns of our models' names, without weight tags.
        select: pytest's -k expression; everything when empty.
        workers: processes, by pytest-xdist; 0 runs in one.

    Raises:
        RuntimeError: the tests could not be fetched, or workers are asked for without pytest-xdist.
    """
    command = _command(select, workers)
    return subprocess.run(command, cwd=timm_tests(), env=_environment(models)).returncode


def _download(folder: Path) -> Path:
    # only timm itself from source: its build backend may come as a wheel, its dependencies are not looked at
    wanted = f"timm=={version('timm')}"
    command = [sys.executable, "-m", "pip", "download", wanted, "--no-binary", "timm", "--no-deps", "--dest", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not download the source distribution of {wanted}:\n{done.stdout[-2000:]}")
    return next(folder.glob("timm-*.tar.gz"))


def _extract(archive: Path, folder: Path) -> None:
    """Unpack the tests alone: timm's sources beside them would hide the installed timm."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            name = member.name.partition("/")[2]
            if member.isfile() and (name.startswith("tests/") or name == "pyproject.toml"):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())


def _move(new: Path, folder: Path) -> None:
    try:
        os.replace(new, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise


def _command(select: str, workers: int) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-p", "timm_plugin", "tests/test_models.py", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-W", "ignore", "--durations=5"]
    if select:
        command += ["-k", select]
    if workers:
        if find_spec("xdist") is None:
            raise RuntimeError(f"{workers} workers want pytest-xdist: pip install pytest-xdist")
        command += ["-n", str(workers)]
    return command


def _environment(models: Sequence[str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "FOVEATE_ACCEPTANCE_MODELS": " ".join(models)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["*"], metavar="PATTERN", help="names of our models")
    parser.add_argument("-k", dest="select", default="", help="pytest's -k expression")
    parser.add_argument("-n", dest="workers", type=int, default=0, help="processes (pytest-xdist)")
    args = parser.parse_args()
    try:
        return run(args.models, args.select, args.workers)
    except RuntimeError as error:
        parser.exit(2, f"run_timm_tests: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
