"""Every committed recipe: it loads, its model exists with these arguments, and its name tells the truth."""

import ast
import re
from dataclasses import replace

import pytest
import torch

from foveate.train import find_recipe, list_recipes, load_recipe
from foveate.train.checkpoints import from_scratch
from foveate.train.data import train_transform
from foveate.train.model import build_net
from foveate.train.optim import build_optimizer

NAME = re.compile(r"(?P<model>.+)_(?P<processes>\d+)xb(?P<batch>\d+)_(?P<data>in1k|mnist5k|cifar10|cub200)(-\w+)?")
every_recipe = pytest.mark.parametrize("name", list_recipes())


@every_recipe
def test_model_optimizer_and_transforms_build(name):
    recipe = from_scratch(load_recipe(name))
    with torch.device("meta"):
        net = build_net(recipe)
    assert net.num_classes == recipe.model.num_classes
    assert build_optimizer(net, recipe.optimizer).defaults["lr"] == recipe.optimizer.lr
    assert train_transform(recipe).transforms


@every_recipe
def test_the_file_name_tells_model_and_batch(name):
    recipe, said = load_recipe(name), NAME.fullmatch(name)
    assert recipe.batch_size == int(said["batch"])
    assert (
        recipe.data.source
        == {"in1k": "folder", "mnist5k": "mnist5k", "cifar10": "torch/cifar10", "cub200": "folder"}[said["data"]]
    )
    if said["data"] == "in1k":
        assert recipe.model.name == said["model"] and recipe.model.num_classes == 1000


@every_recipe
def test_the_header_gives_command_and_results_and_the_file_is_short(name):
    text = find_recipe(name).read_text()
    doc = ast.get_docstring(ast.parse(text))
    assert f"foveate train {name}" in doc and re.search(r"^Published  \S", doc, re.M)
    ours = re.search(r"^Ours       (.+)$", doc, re.M)[1]
    assert ours == "-" or ("seed" in ours and " on " in ours)  # a figure says how it came about
    assert len(text.splitlines()) <= 40


def test_published_values_reach_the_recipes():
    nat, van = load_recipe("nat_base_8xb128_in1k"), load_recipe("van_b3_8xb128_in1k")
    assert (nat.model.drop_path_rate, van.model.drop_path_rate) == (0.5, 0.2)
    assert (nat.schedule.warmup_epochs, van.schedule.warmup_epochs) == (20, 5)
    assert (nat.optimizer.clip_grad, van.optimizer.clip_grad) == (5.0, None)
    assert (nat.data.crop_pct, van.data.crop_pct) == (0.875, 0.9) and van.data.mean == (0.5, 0.5, 0.5)
    isotropic = load_recipe("vitrpb_base_8xb128_in1k")
    assert (isotropic.ema, isotropic.schedule.warmup_epochs, isotropic.optimizer.lr) == (0.9998, 50, 1e-3)
    tuned = load_recipe("dinat_large_384_8xb64_in1k-ft22k")
    assert (tuned.schedule.kind, tuned.schedule.total_epochs, tuned.optimizer.weight_decay) == ("linear", 30, 1e-10)
    assert not tuned.augment.mixes and tuned.model.checkpoint and tuned.data.img_size == 384
    offsets = load_recipe("litv2_medium_8xb128_in1k").optimizer
    assert (offsets.lr_mult, offsets.clip_grad) == ({"*.conv_offset.weight": 0.01}, 5.0)
    larger = load_recipe("litv2_base_8xb128_in1k-ft384")
    assert (larger.optimizer.lr, larger.optimizer.weight_decay, larger.schedule.min_lr) == (4e-5, 1e-8, 4e-7)
    davit, halonet = load_recipe("fv_davit_base_8xb128_in1k"), load_recipe("fv_halonet50ts_8xb256_in1k")
    assert (davit.optimizer.clip_grad, davit.schedule.min_lr, davit.data.crop_pct) == (1.0, 1e-5, 0.9)
    assert (halonet.optimizer.opt, halonet.augment.repeats, halonet.data.img_size) == ("lamb", 3, 256)
    agent = {size: load_recipe(f"agent_pvt_{size}_in1k") for size in ("tiny_8xb128", "large_8xb64")}
    assert [r.optimizer.clip_grad for r in agent.values()] == [None, 1.0]
    assert [(r.schedule.warmup_epochs, r.schedule.cooldown_epochs) for r in agent.values()] == [(5, 10)] * 2
    assert [r.optimizer.lr for r in agent.values()] == [1e-3, 5e-4]
    deit, cswin = load_recipe("agent_deit_tiny_8xb512_in1k"), load_recipe("agent_cswin_base_8xb64_in1k")
    assert (deit.optimizer.lr, deit.schedule.min_lr, deit.model.drop_path_rate) == (4e-3, 4e-5, 0.0)
    assert (cswin.ema, cswin.optimizer.weight_decay, cswin.optimizer.clip_grad) == (0.99992, 0.1, None)
    eca, mobile = load_recipe("eca_resnet101_8xb32_in1k"), load_recipe("eca_mobilenet_v2_1xb96_in1k")
    assert (eca.schedule.step_epochs, eca.schedule.step_rate, eca.augment.randaugment) == (30, 0.1, None)
    assert (mobile.schedule.epochs, mobile.schedule.step_rate, mobile.optimizer.lr) == (400, 0.98, 0.045)


def test_one_recipe_does_not_change_the_base_of_another():
    load_recipe("dinat_large_384_8xb64_in1k-ft22k")
    assert load_recipe("nat_mini_8xb128_in1k").data.img_size == 224


def test_from_scratch_takes_the_starting_weights_away_and_nothing_else():
    recipe = load_recipe("dinat_large_8xb64_in1k-ft22k")
    assert from_scratch(recipe) == replace(recipe, model=replace(recipe.model, checkpoint=None))
