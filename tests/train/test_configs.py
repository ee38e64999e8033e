"""Every committed recipe: it loads, its model exists with these arguments, and its name tells the truth."""

import ast
import re
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image
from timm.models import model_entrypoint

from foveate.attention_ops.macs import count_macs
from foveate.backbones import FAMILIES
from foveate.train import TrainError, find_recipe, list_recipes, load_recipe, read_scalars, train
from foveate.train.catalog import catalog, read_entry
from foveate.train.checkpoints import from_scratch
from foveate.train.data import train_transform
from foveate.train.model import build_net, input_size
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
    assert recipe.global_batch == int(said["processes"]) * int(said["batch"]) * recipe.accumulate
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
    assert (tuned.schedule.kind, tuned.schedule.total_epochs, tuned.optimizer.weight_decay) == ("constant", 30, 1e-10)
    assert nat.optimizer.also_decay == tuned.optimizer.also_decay == ("*.rpb",)
    assert (van.schedule.per, van.schedule.delay_epochs, nat.schedule.per) == ("epoch", 0, "iteration")
    routed = load_recipe("biformer_tiny_8xb128_in1k")
    assert (routed.schedule.per, routed.schedule.delay_epochs, routed.augment.repeats) == ("epoch", 1, 3)
    assert not tuned.augment.mixes and tuned.model.checkpoint and tuned.data.img_size == 384
    offsets = load_recipe("litv2_medium_8xb128_in1k").optimizer
    assert (offsets.lr_mult, offsets.clip_grad) == ({"*.conv_offset.weight": 0.01}, 5.0)
    larger = load_recipe("litv2_base_8xb128_in1k-ft384")
    assert (larger.optimizer.lr, larger.optimizer.weight_decay, larger.schedule.min_lr) == (4e-5, 1e-8, 4e-7)
    davit, halonet = load_recipe("fv_davit_base_8xb128_in1k"), load_recipe("fv_halonet50ts_8xb256_in1k")
    assert [load_recipe(f"fv_davit_{s}_8xb128_in1k").model.drop_path_rate for s in ("tiny", "small")] == [0.1, 0.2]
    assert davit.model.drop_path_rate == 0.4
    assert (davit.optimizer.clip_grad, davit.schedule.min_lr, davit.data.crop_pct) == (1.0, 1e-5, 0.9)
    assert halonet.loss.kind == "bce"
    assert (halonet.optimizer.opt, halonet.augment.repeats, halonet.data.img_size) == ("lamb", 3, 256)
    agent = {size: load_recipe(f"agent_pvt_{size}_in1k") for size in ("tiny_8xb128", "large_8xb64")}
    assert [r.optimizer.clip_grad for r in agent.values()] == [None, 1.0]
    assert [(r.schedule.warmup_epochs, r.schedule.cooldown_epochs) for r in agent.values()] == [(5, 10)] * 2
    assert [r.optimizer.lr for r in agent.values()] == [1e-3, 5e-4]
    deit, cswin = load_recipe("agent_deit_tiny_8xb512_in1k"), load_recipe("agent_cswin_base_8xb64_in1k")
    assert (deit.optimizer.lr, deit.schedule.min_lr, deit.model.drop_path_rate) == (4e-3, 4e-5, 0.0)
    assert (cswin.ema, cswin.optimizer.weight_decay, cswin.optimizer.clip_grad) == (0.99992, 0.1, None)
    phases = [load_recipe(f"sparsifiner_deit_small_8xb168_in1k-phase{n}") for n in (1, 2)]
    assert [(r.optimizer.lr, r.schedule.min_lr) for r in phases] == [(3e-4, 2e-4), (8e-5, 2e-6)]
    assert [r.schedule.epochs for r in phases] == [5, 45]
    assert [r.distill.phase for r in phases] == [1, 2] and {r.schedule.warmup_epochs for r in phases} == {3}
    eca, mobile = load_recipe("eca_resnet101_4xb64_in1k"), load_recipe("eca_mobilenet_v2_1xb96_in1k")
    assert (eca.schedule.step_epochs, eca.schedule.step_rate, eca.augment.randaugment) == (30, 0.1, None)
    assert eca.optimizer.also_decay == mobile.optimizer.also_decay == ("*",)
    assert (mobile.schedule.epochs, mobile.schedule.step_rate, mobile.optimizer.lr) == (400, 0.98, 0.045)


@every_recipe
def test_the_header_tells_the_size_of_the_model(name):
    entry = read_entry(name)
    with torch.device("meta"):
        net = build_net(from_scratch(load_recipe(name)))
    assert entry.params == pytest.approx(sum(p.numel() for p in net.parameters()) / 1e6, abs=0.051)
    assert entry.gmacs > 0 and entry.emacs > 0


@pytest.mark.slow
@every_recipe
def test_the_header_tells_the_multiply_adds(name):
    recipe = from_scratch(load_recipe(name))
    with torch.device("cpu" if recipe.data.source == "mnist5k" else "meta"):  # large ones without computing
        macs = count_macs(build_net(recipe).eval(), torch.zeros(1, *input_size(recipe)))
    assert read_entry(name).gmacs == pytest.approx(macs / 1e9, rel=0.02)


def teacher_file(recipe, folder):
    """Write weights of the recipe's teacher, for two classes."""
    torch.manual_seed(0)
    torch.save(timm.create_model(recipe.distill.teacher, num_classes=2).state_dict(), folder / "teacher.pth")
    return str(folder / "teacher.pth")


@pytest.mark.slow
@every_recipe
def test_every_recipe_takes_two_steps_from_a_folder(name, tmp_path):
    """At 64 pixels where the model takes any size; without the plan of a pruned model, which a user makes first."""
    recipe = from_scratch(load_recipe(name))
    of_one_size = ("swin", "flowformer", "ninformer", "dcal")
    fixed = recipe.model.name.startswith(of_one_size) or recipe.distill is not None  # the teacher takes one size
    size = recipe.data.img_size if fixed else 64
    mode = "L" if recipe.model.in_chans == 1 else "RGB"
    for split, count in (("train", 4), ("validation", 1)):
        for index in range(2):
            (tmp_path / split / f"{index}").mkdir(parents=True)
            for i in range(count):
                Image.effect_noise((70, 80), 60).convert(mode).save(tmp_path / split / f"{index}" / f"{i}.png")
    options = {
        "model.num_classes": 2, "data.source": "folder", "data.root": str(tmp_path), "data.img_size": size,
        "data.workers": 0, "batch_size": 4, "schedule.epochs": 1,
        "schedule.warmup_epochs": 0, "schedule.warmup_lr": None,
        "schedule.cooldown_epochs": 0, "schedule.delay_epochs": 0, "hooks": (), "augment.repeats": 1,
        "precision": "bf16" if recipe.precision == "fp16" else recipe.precision,
    }  # fmt: skip
    if recipe.distill is not None:
        options |= {"distill.pretrained": False, "distill.checkpoint": teacher_file(recipe, tmp_path)}
    result = train(recipe, work_dir=tmp_path / "run", cfg_options=options, device="cpu")
    assert read_scalars(result.log)[-1]["iter"] == 2


DIGITS = [name for name in list_recipes() if name.endswith("_micro_1xb64_mnist5k")]


def test_every_family_has_a_recipe_for_the_digits():
    models = {load_recipe(name).model.name for name in DIGITS}
    assert {family.__name__ for family in FAMILIES} <= {model_entrypoint(name).__module__ for name in models}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIGITS)
def test_the_digits_recipe_of_every_family_reaches_97_percent(name, tmp_path):
    assert train(name, work_dir=tmp_path / "run", device="cpu").best_top1 >= 97


def test_the_catalog_lists_and_filters():
    assert [entry.name for entry in catalog()] == list_recipes()
    assert {entry.model for entry in catalog("van_b")} >= {"van_b0", "van_b6"}
    dinat, entry = catalog("nat_mini_8xb128")  # a part of both names
    assert dinat.name == "dinat_mini_8xb128_in1k"
    assert (entry.epochs, entry.global_batch, entry.devices, entry.published, entry.ours) == (
        310,
        1024,
        8,
        "81.8",
        None,
    )
    assert entry.emacs == pytest.approx(310 * 1_281_167 * 3 * entry.gmacs / 1e9)
    with pytest.raises(TrainError, match="no recipe matches 'resnet9000'"):
        catalog("resnet9000")


def test_one_recipe_does_not_change_the_base_of_another():
    load_recipe("dinat_large_384_8xb64_in1k-ft22k")
    assert load_recipe("nat_mini_8xb128_in1k").data.img_size == 224


def test_from_scratch_takes_the_starting_weights_away_and_nothing_else():
    recipe = load_recipe("dinat_large_8xb64_in1k-ft22k")
    assert from_scratch(recipe) == replace(recipe, model=replace(recipe.model, checkpoint=None))
