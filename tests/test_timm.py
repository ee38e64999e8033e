"""What this package takes from timm beyond its public names, and which releases it takes."""

import ast
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch
from packaging.requirements import Requirement

import foveate
from foveate import _timm

ROOT = Path(foveate.__file__).parent
SOURCES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "tests"]


def private_imports(path: Path) -> list[str]:
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and not n.level]
    names = [f"{n.module}.{alias.name}" for n in nodes for alias in n.names if n.module and n.module.startswith("timm")]
    return [name for name in names if "._" in name]


def test_private_names_of_timm_are_imported_in_one_file():
    using = {path.relative_to(ROOT).as_posix() for path in SOURCES if private_imports(path)}
    assert using == {"_timm.py"}


def test_the_installed_timm_is_one_that_this_package_allows():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    needs = map(Requirement, config["options"]["install_requires"].split())
    allowed = next(need for need in needs if need.name == "timm").specifier
    assert {spec.operator for spec in allowed} == {">=", "<"} and version("timm") in allowed


def test_the_private_names_do_what_they_are_used_for():
    """A timm release that changes them fails here, with the name."""
    assert _timm.feature_take_indices(4, 2) == ([2, 3], 3) and _timm.feature_take_indices(4, [0, -2]) == ([0, 2], 2)
    with pytest.raises(AssertionError):
        _timm.feature_take_indices(4, [4])
    (stage,) = _timm.decode_arch_def([["ir_r2_k3_s2_e6_c24"]])
    assert [(block["stride"], block["exp_ratio"], block["out_chs"]) for block in stage] == [(2, 6.0, 24)] * 2
    model = timm.create_model("test_vit", num_classes=3)
    _timm.update_model_args(model, widths={})
    assert model._model_args["widths"] == {}
    maps = _timm.FeatureGetterNet(model, out_indices=[0, 1])(torch.zeros(1, 3, 160, 160))
    assert [tuple(x.shape) for x in maps] == [(1, 64, 10, 10)] * 2
