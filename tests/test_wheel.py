"""The wheel holds the package, the whole package and nothing but the package."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import copy
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
NOT_SHIPPED = ("tests", "docs", ".ci")


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def repository_files() -> list[Path]:
    """What a commit of everything would hold: tracked files and new ones that git does not ignore."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return [Path(name) for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sources() -> set[str]:
    """The package's Python files, as the wheel should name them."""
    shipped = [path for path in repository_files() if path.suffix == ".py" and path.parts[0] not in NOT_SHIPPED]
    return {str(Path("foveate") / path) for path in shipped}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: an old build/ folder beside the sources would leak into the wheel."""
    copied, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for path in repository_files():
        (copied / path).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / path, copied / path)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", out, cwd=copied)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    return set(ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds nothing but the installed wheel."""
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def run_installed(installed: Path, code: str) -> str:
    """Run code away from the repository, with the installed wheel in front of everything."""
    env = os.environ | {"PYTHONPATH": str(installed)}
    return run(sys.executable, "-c", code, cwd=installed.parent, env=env).strip()


def test_nothing_but_foveate_lies_at_the_top(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if top != "foveate" and not top.startswith("foveate-")} == set()
    assert "foveate" in tops


def test_every_source_file_is_inside_and_no_other(names, sources):
    assert {name for name in names if name.endswith(".py")} == sources


def test_type_checkers_and_readers_find_their_files(names):
    assert "foveate/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_package_imports_from_the_wheel(installed, sources):
    packages = sorted({".".join(Path(name).parent.parts) for name in sources if "configs" not in name})
    assert "foveate.kernels" in packages and "foveate.export" in packages
    imports = f"import importlib; found = [importlib.import_module(name).__file__ for name in {packages}]; "
    found = run_installed(installed, imports + "print(*found, sep='\\n')").splitlines()
    found = [line for line in found if line.endswith(".py")]  # MMEngine imports transformers, which may write messages
    assert len(found) == len(packages)
    assert [path for path in found if not path.startswith(str(installed))] == []


def test_a_model_is_made_from_the_wheel(installed):
    code = "import foveate, timm, torch; net = timm.create_model('van_b0', num_classes=7).eval(); "
    shape = run_installed(installed, code + "print(foveate.__file__, *net(torch.zeros(1, 3, 64, 96)).shape)")
    assert shape == f"{installed}/foveate/__init__.py 1 7"


def test_the_command_is_installed(installed):
    help_text = run_installed(
        installed, "from foveate.commands.main import app; app(['--help'], standalone_mode=False)"
    )
    assert "Usage" in help_text
