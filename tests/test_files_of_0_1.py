"""What version 0.1 wrote is read by this one: checkpoints, plans, recipes and exported programs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from files_of_0_1.record import MODEL, images, write_images

from foveate.export import load_model
from foveate.pruning import Plan
from foveate.train import evaluate, load_net, load_recipe, train

FILES = Path(__file__).parent / "files_of_0_1"
EXPECTED = torch.tensor(json.loads((FILES / "expected.json").read_text())["model"])
ARGUMENTS = {key: value for key, value in MODEL.items() if key != "name"}


def close(out):
    torch.testing.assert_close(out.detach(), EXPECTED, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL["name"], FILES / "model.pth", **ARGUMENTS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return root


def test_a_checkpoint_gives_the_same_model(model):
    close(model(images()))


def test_the_checkpoints_of_a_run_are_read(data):
    for name in ("best.pth", "last.pth"):
        assert load_net(FILES / name)(images()).shape == (2, 2)
    assert evaluate(FILES / "best.pth", data=data).images == 8


def test_a_plan_is_applied(model):
    plan = Plan.load(FILES / "plan.json")
    pruned = load_model(MODEL["name"], FILES / "model.pth", **ARGUMENTS)
    plan.apply(pruned)
    kept = {name: (pruned.get_parameter(name) != 0).float().mean().item() for name in plan.masks}
    assert kept and all(0 < share < 0.9 for share in kept.values())
    assert not torch.equal(pruned(images()), EXPECTED)


def test_a_plan_of_structures_cuts_what_it_zeroes():
    plan = Plan.load(FILES / "structured_plan.json")
    zeroed, whole = (load_model(MODEL["name"], FILES / "model.pth", **ARGUMENTS) for _ in range(2))
    plan.apply(zeroed)
    cut = plan.cut(whole)
    assert sum(p.numel() for p in cut.parameters()) == plan.counts.params_after < plan.counts.params_before
    torch.testing.assert_close(cut(images()), zeroed(images()), rtol=1e-4, atol=1e-5)


def test_a_recipe_is_read_and_runs(data, tmp_path, monkeypatch):
    for name in ("base.py", "recipe.py", "plan.json"):
        (tmp_path / name).write_bytes((FILES / name).read_bytes())
    (tmp_path / "images").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(tmp_path / "recipe.py")
    assert (recipe.seed, recipe.ema, recipe.model.name) == (3, 0.5, MODEL["name"])
    assert train(recipe, work_dir=tmp_path / "run").best_top1 is not None


@pytest.mark.parametrize("name", ["program.pt2", "program_of_ops.pt2"])
def test_an_exported_program_runs(name):
    close(torch.export.load(FILES / name).module()(images()))


def test_recipes_that_are_data_name_our_hook_in_a_process_that_only_trains(data, tmp_path):
    code = f"""
from foveate.train import train
recipe = dict(model={MODEL!r}, data=dict(root={str(data)!r}, img_size=32, workers=0), batch_size=2,
    optimizer=dict(lr=1e-3), schedule=dict(epochs=1), hooks=[dict(type="KeepMasks", plan={str(FILES / "plan.json")!r})])
train(recipe, work_dir={str(tmp_path / "run")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
