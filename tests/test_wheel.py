"""The wheel and the sdist hold the package, the whole package and nothing but the package; they install and run.

Nothing is downloaded: builds use the setuptools that is installed, and the fresh environment finds the packages that
foveate needs where these tests find them.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from shutil import copy
from sysconfig import get_path
from zipfile import ZipFile

import pytest

import foveate

ROOT = Path(__file__).parents[1]
NOT_SHIPPED = ("tests", "docs", ".ci", ".github")
SETTINGS = {"configs/ruff.toml"}  # of the linter


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
def data() -> set[str]:
    """What packages hold beside Python: templates, tables, results."""
    inside = [path for path in repository_files() if len(path.parts) > 1 and path.parts[0] not in NOT_SHIPPED]
    files = {path.as_posix() for path in inside if path.suffix != ".py"} - SETTINGS
    return {f"foveate/{path}" for path in files if not Path(path).name.startswith(".")}


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """Sources to build from: an old build/ folder beside those of the repository would leak into the wheel."""
    folder = tmp_path_factory.mktemp("sources")
    for path in repository_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / path, folder / path)
    return folder


def build(kind: str, sources: Path, out: Path) -> Path:
    """Build the wheel or the sdist of a folder with the installed setuptools."""
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out, cwd=sources)
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(copied, tmp_path_factory) -> Path:
    return build("wheel", copied, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def sdist(copied, tmp_path_factory) -> Path:
    return build("sdist", copied, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    return set(ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A fresh virtual environment with the wheel; everything else comes from the environment of the tests."""
    return install(wheel, tmp_path_factory.mktemp("fresh") / "venv")


def install(package: Path, environment: Path) -> Path:
    """Make a virtual environment and install a wheel into it, without its dependencies and without an index."""
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment).strip()
    paths = dict.fromkeys((get_path("purelib"), get_path("platlib")))  # not their .pth files: no editable foveate
    Path(site, "packages_of_the_tests.pth").write_text("\n".join(paths))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--no-build-isolation", "--ignore-installed", package, cwd=environment, env=own_paths())
    return environment


def own_paths() -> dict[str, str]:
    """Return the variables of this process, but for those that name places to import from."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def run_installed(environment: Path, *command: str) -> str:
    """Run a program of the fresh environment away from the repository."""
    folder = environment / ("Scripts" if os.name == "nt" else "bin")
    return run(folder / command[0], *command[1:], cwd=environment, env=own_paths()).strip()


def test_nothing_but_foveate_lies_at_the_top(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if top != "foveate" and not top.startswith("foveate-")} == set()
    assert "foveate" in tops


def test_every_source_file_is_inside_and_no_other(names, sources):
    assert {name for name in names if name.endswith(".py")} == sources


def test_type_checkers_and_readers_find_their_files(names):
    assert {"foveate/py.typed", "foveate/backbones/figures.csv"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "foveate/analysis/page.html" in names


def test_every_file_of_data_is_inside(names, data):
    assert "foveate/py.typed" in names and data - names == set()
    assert len([name for name in data if name.startswith("foveate/benchmarks/results/")]) > 10


def test_the_wheel_of_the_sdist_is_the_wheel_of_the_repository(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert unpacked.name == f"foveate-{foveate.__version__}" and (unpacked / "CHANGELOG.md").exists()
    assert not (unpacked / "tests").exists()
    again = ZipFile(build("wheel", unpacked, tmp_path / "dist"))
    first = ZipFile(wheel)
    assert again.namelist() and sorted(again.namelist()) == sorted(first.namelist())
    assert [name for name in first.namelist() if again.read(name) != first.read(name)] == []


def test_the_sdist_installs(sdist, tmp_path):
    environment = install(sdist, tmp_path / "venv")
    code = "from importlib.metadata import distribution as d; print(d('foveate').version, d('foveate').locate_file(''))"
    version, place = run_installed(environment, "python", "-c", code).split()
    assert version == foveate.__version__ and Path(place).is_relative_to(environment)
    assert (Path(place) / "foveate/py.typed").exists() and (environment / "bin/foveate").exists()


def test_the_wheel_states_version_license_and_extras(wheel):
    metadata = ZipFile(wheel).read(f"foveate-{foveate.__version__}.dist-info/METADATA").decode()
    lines = metadata.partition("\n\n")[0].splitlines()
    assert {f"Version: {foveate.__version__}", "Requires-Python: >=3.10"} <= {*lines}
    assert any(line.startswith("License") and line.endswith(": Apache-2.0") for line in lines)
    assert {f"Provides-Extra: {extra}" for extra in ("export", "demo", "test", "docs")} <= {*lines}


def test_every_package_imports_from_the_wheel(environment, sources):
    packages = sorted({".".join(Path(name).parent.parts) for name in sources if "configs" not in name})
    assert "foveate.kernels" in packages and "foveate.export" in packages
    imports = f"import importlib; found = [importlib.import_module(name).__file__ for name in {packages}]; "
    found = run_installed(environment, "python", "-c", imports + "print(*found, sep='\\n')").splitlines()
    found = [line for line in found if line.endswith(".py")]  # MMEngine imports transformers, which may write messages
    assert len(found) == len(packages)
    assert [path for path in found if not Path(path).is_relative_to(environment)] == []


def test_a_model_is_made_from_the_wheel(environment):
    code = "import foveate, timm, torch; net = timm.create_model('van_b0', num_classes=7).eval(); "
    code += "print(foveate.__file__, *net(torch.zeros(1, 3, 64, 96)).shape)"
    shape = run_installed(environment, "python", "-c", code)
    file, *shape = shape.splitlines()[-1].split()
    assert Path(file).is_relative_to(environment) and shape == ["1", "7"]


def test_the_command_is_installed(environment):
    assert run_installed(environment, "foveate", "--version").split()[-1] == foveate.__version__
    assert "nat_micro_1xb64_mnist5k" in run_installed(environment, "foveate", "recipes", "nat_micro")
