"""What this package takes from timm and torch beyond their public names, and which releases of timm it takes."""

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


def dotted(node: ast.AST) -> str:
    """`torch.a.b` of an expression, or nothing."""
    if isinstance(node, ast.Attribute):
        return f"{owner}.{node.attr}" if (owner := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def private_names(path: Path, package: str) -> set[str]:
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    names = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    names |= {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {name for name in names if name.startswith(f"{package}.") and "._" in name and ".__" not in name}
    return {name for name in names if not name.startswith("torch.ops.")}  # operators are in torch's schemas


@pytest.mark.parametrize("package", ["timm", "torch"])
def test_private_names_are_used_in_one_file(package):
    using = {path.relative_to(ROOT).as_posix() for path in SOURCES if private_names(path, package)}
    assert using - {path for path in using if path.startswith("benchmarks/")} == {f"_{package}.py"}


def test_private_operators_are_used_where_they_are_tried_or_told():
    """oneDNN's are tried before use; the flash kernel's two are what torch's own backward calls.

    _torch.py calls none of oneDNN's: it names one that a compiler is to leave alone.
    """
    using = {path.name for path in SOURCES if "torch.ops.mkldnn." in path.read_text()}
    assert using == {"_onednn.py", "_torch.py"}


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
