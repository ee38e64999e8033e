"""The folders are a stack, imports point down, and importing the package leaves timm unchanged."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import foveate

ROOT = Path(__file__).parents[1]
HEIGHT: dict[str, float] = {"kernels": 0, "attention_ops": 1, "backbones": 2, "export": 3, "fusion": 2, "pruning": 3}
HEIGHT |= {"train": 3.5, "benchmarks": 4, "commands": 4.5, "analysis": 3}  # train/ registers the hook of pruning/
HEIGHT |= dict.fromkeys(("_version", "_errors", "_digits", "_unpickle", "_modes", "_timm"), 0)
HEIGHT["_torch"] = -1  # the files at the root
HEIGHT |= dict.fromkeys(("_files", "_model_args", "_memory"), 0.5) | {"_torch_files": 1.2, "_weights": 1.4}
HEIGHT |= {"__init__": 3, "__main__": 5}
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier()}
SOURCES = [*ROOT.glob("*.py"), *(path for folder in HEIGHT for path in (ROOT / folder).rglob("*.py"))]
FILES = sorted(path.relative_to(ROOT) for path in SOURCES)


def imports(path: Path) -> Iterator[str]:
    """Every imported name, absolute; those of our package, relative or not, begin with `foveate.`."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ("foveate", *path.parent.parts)
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join(filter(None, (*base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "foveate" and len(parts) > 1 else None


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    here = path.parts[0].removesuffix(".py")
    rooms = {room(name) for name in imports(path)} - {None, here}
    assert {r for r in rooms if HEIGHT.get(r, -1) >= HEIGHT[here]} == set()
    assert rooms & {"configs", "tests"} == set()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_our_folders_are_imported_relatively(path):
    source = ast.parse((ROOT / path).read_text())
    absolute = [node for node in ast.walk(source) if isinstance(node, ast.ImportFrom) and not node.level]
    names = {node.module.split(".")[0] for node in absolute}
    names |= {a.name.split(".")[0] for node in ast.walk(source) if isinstance(node, ast.Import) for a in node.names}
    assert names & {*FOLDERS, "foveate"} == set()


def module_file(name: str) -> Path | None:
    """The file of the longest part of a dotted name that is one of our modules."""
    parts = name.split(".")[1:] if name.split(".")[0] == "foveate" else []
    for end in range(len(parts), 0, -1):
        path = Path(*parts[:end])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file in FILES:
                return file
    return None


def test_no_two_files_import_each_other():
    graph = {path: {module_file(name) for name in imports(path)} - {None, path} for path in FILES}
    tuple(TopologicalSorter(graph).static_order())  # a CycleError names the circle


def test_the_stack_has_files():
    assert {path.parts[0] for path in FILES} >= {"kernels", "attention_ops", "backbones", "train", "export", "commands"}


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "foveate", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, foveate.__version__), done.stderr


def test_importing_foveate_needs_no_triton():
    out = run_python("import sys; sys.modules['triton'] = None; import foveate; print(foveate.__version__)")
    assert out.strip()


def test_importing_foveate_loads_nothing_heavy_that_timm_does_not():
    heavy = {
        "mmengine",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "matplotlib",
        "pytorch_grad_cam",
        "mlxtend",
        "pandas",
        "rich",
        "triton",
        "typer",
    }
    loaded = "{name.partition('.')[0] for name in sys.modules}"
    code = f"import sys, timm; before = {loaded}; import foveate; print(*({loaded} - before))"
    assert heavy & set(run_python(code).split()) == set()


DUMP = """
import json, sys, warnings
from dataclasses import asdict
import timm
from timm.models import _registry as r

def dump():
    cfgs = {name: repr(asdict(cfg)) for name, cfg in r._model_pretrained_cfgs.items()}
    entry = {name: fn.__module__ for name, fn in r._model_entrypoints.items()}
    weights = timm.list_models(pretrained=True)
    modules = {module: timm.list_models(module=module) for module in timm.list_modules()}
    tags = {name: list(tags) for name, tags in r._model_with_tags.items()}
    return {"cfgs": cfgs, "entry": entry, "weights": weights, "modules": modules, "tags": tags}

before = dump()
warnings.simplefilter("error")  # timm warns when a name is taken twice
import foveate
print(json.dumps([before, dump()]))
"""


@pytest.fixture(scope="module")
def registry() -> tuple[dict, dict]:
    """timm's registry before and after `import foveate`."""
    before, after = json.loads(run_python(DUMP))
    return before, after


@pytest.mark.parametrize("table", ["cfgs", "entry", "modules", "tags"])
def test_timms_own_entries_stay_as_they_are(registry, table):
    before, after = registry
    assert before[table]
    changed = [name for name, value in before[table].items() if after[table].get(name) != value]
    assert changed == []


def test_timms_own_weights_stay_listed(registry):
    before, after = registry
    assert set(before["weights"]) - set(after["weights"]) == set()


def test_what_is_new_in_timms_registry_is_ours(registry):
    before, after = registry
    new = {name: module for name, module in after["entry"].items() if name not in before["entry"]}
    assert new
    assert [name for name, module in new.items() if not module.startswith("foveate.backbones.")] == []


def test_the_types_of_what_users_import_have_no_known_errors():
    listed = (ROOT / "mypy-baseline.txt").read_text().splitlines()
    folders = {line.split("/")[1] for line in listed}
    assert listed and folders <= {"benchmarks", "kernels", "tests"}
