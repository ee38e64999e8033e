"""`foveate list`: models with their figures, weights and licenses, and the op bodies of this machine."""

import json
from pathlib import Path

import pytest
import torch
from timm.models import get_pretrained_cfg
from typer.testing import CliRunner

import foveate
from foveate.attention_ops._op import OPS, Impl
from foveate.backbones.published import TOP1
from foveate.commands import list as listing
from foveate.commands.main import app


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Decide which library multiplies: nothing is measured, and the user's calibration stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FOVEATE_PRODUCTS", "torch")


def run(*arguments: str):
    return CliRunner().invoke(app, ["list", *arguments])


def listed(*arguments: str) -> dict[str, dict]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return {entry["name"]: entry for entry in json.loads(done.stdout)["models"]}


def test_every_model_is_listed_once_for_each_of_its_weights():
    found = listed()
    assert {entry["model"] for entry in found.values()} == set(foveate.list_models())
    assert {name for name in TOP1 if name.partition(".")[0] in foveate.list_models()} <= set(found)
    assert all(entry["params"] > 1e5 and entry["macs"] > 1e7 for entry in found.values())


def test_a_model_has_its_figures_accuracy_license_and_url():
    entry = listed("van_b1")["van_b1.in1k"]
    assert (entry["px"], entry["params"], entry["top1"]) == (224, 13_861_800, 81.1)
    assert entry["macs"] == pytest.approx(2.5e9, rel=0.02) and entry["source"] == "arXiv:2202.09741"
    assert entry["license"] == "apache-2.0" and entry["weights"] == get_pretrained_cfg("van_b1").url


@pytest.mark.parametrize(
    ("name", "weights", "license"),
    [
        ("biformer_tiny", "file only", "mit"),
        ("agent_pvt_tiny.in1k", "file only", "not stated"),
        ("moh_transnext_base_50", "file only", "apache-2.0"),
        ("van_b5", "none published", None),
        ("gqa_vit_base", "none published; timm's vit_*_patch16_224 load", None),
        ("fv_davit_tiny.msft_in1k", "https://huggingface.co/timm/davit_tiny.msft_in1k", "apache-2.0"),
    ],
)
def test_weights_without_a_link_are_told_apart_from_no_weights(name, weights, license):
    entry = listed(name)[name]
    assert entry["weights"].startswith(weights) and entry["license"] == license


def test_weights_of_other_sizes_have_figures_of_their_own():
    found = listed("litv2_base")
    small, large = found["litv2_base.in1k"], found["litv2_base.in1k_384"]
    assert (small["px"], large["px"]) == (224, 384) and large["macs"] > 2.9 * small["macs"]
    assert (small["top1"], large["top1"]) == (83.6, 84.7)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("van_b[01]*", {"van_b0", "van_b1"}),
        ("transnext_small", {"moh_transnext_small_75", "moh_transnext_small_80"}),
        ("in1k_448", {"agent_deit_small"}),
        ("VAN_B[01]*", {"van_b0", "van_b1"}),
    ],
)
def test_a_pattern_is_a_part_of_a_name_or_a_shell_pattern(pattern, names):
    assert {entry["model"] for entry in listed(pattern).values()} == names


def test_the_table_has_a_line_per_weights_and_the_bodies():
    done = run("van_b*")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["model", "px", "params", "M", "GMACs", "top-1", "license", "weights"]
    assert lines[1].split() == [
        "van_b0.in1k",
        "224",
        "4.1",
        "0.86",
        "75.4",
        "apache-2.0",
        get_pretrained_cfg("van_b0").url,
    ]
    assert "7 models; op bodies on this machine:" in done.stdout
    assert "fused (Triton)" in done.stdout and "neighborhood_attention" in done.stdout


def test_the_entries_of_the_json_are_documented():
    page = (Path(foveate.__file__).parent / "docs/measure.md").read_text(encoding="utf-8")
    data = json.loads(run("van_b0", "--json").stdout)
    names = {*data, *data["models"][0], *data["bodies"][0]}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_an_unknown_name_is_one_line_with_close_names():
    done = run("vam_b0")
    assert (
        done.exit_code == 2
        and done.stderr == "foveate list: no model matches 'vam_b0'; did you mean van_b0 or van_b6 or van_b5?\n"
    )


def bodies() -> dict[str, list[listing.Body]]:
    found: dict[str, list[listing.Body]] = {}
    for body in listing.op_bodies():
        found.setdefault(body.name, []).append(body)
    return found


def test_bodies_say_why_they_do_not_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(listing, "why_no_triton", lambda x: f"no kernels on {x.device.type}")
    found = bodies()
    assert found["tiled, reference"] == [listing.Body("tiled, reference", sorted(OPS), None)]
    triton, *others = found["fused (Triton)"]
    assert triton.why_not == "no kernels on cpu, and torch sees no CUDA device"
    assert triton.ops == sorted(name for name, op in OPS.items() if Impl.FUSED in op.bodies)
    assert sorted(triton.ops + [name for body in others for name in body.ops]) == sorted(OPS)
    assert found["oneDNN products"][0].why_not == "FOVEATE_PRODUCTS=torch"


def test_products_follow_the_setting(monkeypatch):
    monkeypatch.setenv("FOVEATE_PRODUCTS", "onednn")
    monkeypatch.setattr(listing, "has_bfloat16_products", lambda: False)
    single, half = bodies()["oneDNN products"]
    assert single.why_not is None and half.why_not == "this CPU has no bfloat16 products"


def test_a_runnable_kernel_is_said_to_run(monkeypatch):
    monkeypatch.setattr(listing, "why_no_triton", lambda x: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bodies()["fused (Triton)"][0].why_not is None
