"""Validation of any timm model: what training measured, class by class, each image once, unreadable ones counted."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

from foveate.train import TrainError, ValidationRequest, load_net, train, validate
from foveate.train.validate import write_classes

QUICK = {"workers": 0, "batch_size": 4}
LEARNER = {"name": "nat_mini", "dims": (16, 32), "depths": (1, 1), "head_dim": 8, "kernel_size": 3, "num_classes": 3}


class Known(torch.nn.Module):
    """A timm-like model that answers with a row of a table, by the red value of an image of one color."""

    def __init__(self, table, **cfg):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(table))
        self.num_classes = self.table.shape[1]
        self.pretrained_cfg = {
            "input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0,
            "num_classes": self.num_classes, **cfg,
        }  # fmt: skip

    def forward(self, x):
        return self.table[(x[:, 0, 4, 4] * 255).round().long()]


def colors(root: Path, images: dict[str, int]) -> Path:
    """Write images of one color each: name -> red value."""
    for name, red in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (red, 0, 0)).save(root / name, format="PNG")
    return root


def measure(model, data, **more):
    return validate(model, ValidationRequest(data=data, **QUICK, **more), device="cpu")


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    recipe = {
        "model": LEARNER, "data": {"root": str(images), "img_size": 32, "workers": 0},
        "optimizer": {"lr": 3e-3}, "schedule": {"epochs": 2}, "batch_size": 4,
    }  # fmt: skip
    return train(recipe, work_dir=tmp_path_factory.mktemp("run") / "run", device="cpu")


def test_a_checkpoint_has_the_accuracy_that_training_recorded(run, images):
    result = measure(load_net(run.last_checkpoint), images)
    record = [json.loads(line) for line in run.log.open()][-1]
    assert (result.images, result.input_size) == (9, (3, 32, 32))
    assert (result.top1, result.top5) == pytest.approx((record["val_top1"], record["val_top5"]))
    assert result.loss == pytest.approx(record["val_loss"], rel=1e-4)


def test_hits_losses_and_classes_are_counted(tmp_path):
    table = [[9.0, 8, 7, 6, 5, 4, 3], [0, 9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 0, 1]]
    folders = {f"{name}/{i}.png": red for name, reds in zip("abcdefg", ([0], [1, 0], [], [], [], [2], [1]), strict=True)
               for i, red in enumerate(reds)}  # fmt: skip
    for name in "cde":
        folders[f"{name}/0.png"] = 1
    result = measure(Known(table), colors(tmp_path / "data", folders))
    assert result.images == 8 and result.top1 == pytest.approx(100 * 2 / 8)  # a/0 and b/0
    assert [(row.index, row.name, row.images) for row in result.classes][1] == (1, "b", 2)
    assert [row.top1 for row in result.classes] == [100, 50, 0, 0, 0, 0, 0]
    assert [row.top5 for row in result.classes] == [100, 100, 100, 100, 100, 0, 0]
    logits = torch.tensor([table[red] for red in (0, 1, 0, 1, 1, 1, 2, 1)])
    truth = torch.tensor([0, 1, 1, 2, 3, 4, 5, 6])
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, truth).item(), rel=1e-5)
    write_classes(result, tmp_path / "classes.csv")
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert (
        rows[1] == {"class": "1", "name": "b", "images": "2", "top1": "50.0000", "top5": "100.0000"} and len(rows) == 7
    )


def test_a_bare_folder_a_split_a_tar_and_a_list_are_measured_alike(run, images, tmp_path):
    net = load_net(run.last_checkpoint)
    wanted = measure(net, images)
    shutil.make_archive(str(tmp_path / "val"), "tar", images / "val")
    lines = [f"{path} {path.parent.name}\n" for path in sorted((images / "val").glob("*/*.png"))]
    (tmp_path / "list.txt").write_text("".join(lines))
    for data in (images / "val", tmp_path / "val.tar", tmp_path / "list.txt"):
        result = measure(net, data)
        assert (result.top1, result.loss, result.images) == pytest.approx((wanted.top1, wanted.loss, 9)), data
    assert measure(net, images, split="train").images == 24


def test_images_that_cannot_be_read_are_counted_and_named_and_no_neighbor_takes_their_place(run, images, tmp_path):
    data = shutil.copytree(images / "val", tmp_path / "val")
    net = load_net(run.last_checkpoint)
    (data / "bee" / "0.png").write_bytes(b"")
    (data / "cow" / "1.png").write_bytes((data / "cow" / "1.png").read_bytes()[:60])
    result = measure(net, data)
    assert result.images == 7 and [row.images for row in result.classes] == [3, 2, 2]
    assert [name.partition(" (")[0] for name in result.unreadable] == ["bee/0.png", "cow/1.png"]
    for path in data.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(TrainError, match=r"none of its 9 images can be read, the first is ant/0.png"):
        measure(net, data)


def test_classes_are_found_by_the_names_that_the_model_knows(tmp_path):
    table = [[9.0, 0, 0], [0, 9, 0], [0, 0, 9]]
    data = colors(tmp_path, {"cow/0.png": 0, "ant/0.png": 2})  # a part of the classes, in another order
    named = Known(table, label_names=["cow", "bee", "ant"])
    assert measure(named, data).top1 == 100
    with pytest.raises(TrainError, match="class 'ant' of the data is not among the 3 of the model's class names"):
        measure(Known(table, label_names=["cow", "bee", "auk"]), data)
    with pytest.raises(TrainError, match="has 2 classes, the model 3: give a class map"):
        measure(Known(table), data)
    (tmp_path / "map.txt").write_text("cow\nbee\nant\n")
    assert measure(Known(table), data, class_map=tmp_path / "map.txt").top1 == 100
    (tmp_path / "map.json").write_text('{"cow": 0, "ant": 7}')
    with pytest.raises(TrainError, match="class 'ant' has the index 7, the model has 3 classes"):
        measure(Known(table), data, class_map=tmp_path / "map.json")


def test_a_part_of_imagenets_folders_is_numbered_by_its_synsets(tmp_path):
    names = ImageNetInfo().label_names()
    table = torch.full((2, 1000), -9.0)
    table[0, 5], table[1, 700] = 9, 9
    data = colors(tmp_path, {f"{names[5]}/0.png": 0, f"{names[700]}/0.png": 1})
    assert measure(Known(table.tolist()), data).top1 == 100


def test_real_labels_are_judged_beside_the_folders(tmp_path):
    table = [[9.0, 8, 0, 0, 0, 0, 0], [0, 9, 8, 0, 0, 0, 0]]
    names = [f"{name}/ILSVRC2012_val_{i:08d}.JPEG" for i, name in enumerate("abcdefg", 1)]
    data = colors(tmp_path / "data", dict.fromkeys(names, 0))
    (tmp_path / "real.json").write_text(json.dumps([[0], [1, 0], [], [1], [6], [2, 3], [5]]))
    result = measure(Known(table), data, real_labels=tmp_path / "real.json")
    assert result.real_images == 6 and result.real_top1 == pytest.approx(100 * 2 / 6)
    assert result.top1 == pytest.approx(100 / 7) and result.real_top5 == pytest.approx(100 * 5 / 6)
    (tmp_path / "real.json").write_text("[[0]]")
    with pytest.raises(TrainError, match="is not a validation image of ImageNet"):
        measure(Known(table), data, real_labels=tmp_path / "real.json")
    (tmp_path / "real.json").write_text('[["cat"]]')
    with pytest.raises(TrainError, match="wanted a list with a list of class indices for each image"):
        measure(Known(table), data, real_labels=tmp_path / "real.json")
    with pytest.raises(TrainError, match="is not a validation image of ImageNet"):
        measure(Known(table), colors(tmp_path / "other", {f"{n}/x.png": 0 for n in "abcdefg"}), real_labels="imagenet")


def test_logits_that_are_not_finite_count_as_wrong_and_are_reported(tmp_path):
    data = colors(tmp_path, {"a/0.png": 0, "b/0.png": 1})
    result = measure(Known([[float("nan"), 0.0], [0.0, 9.0]]), data)
    assert (result.top1, result.not_finite) == (50, 1)


def test_size_crop_and_precision_change_what_is_measured(run, images):
    net = load_net(run.last_checkpoint)
    plain = measure(net, images)
    for change in ({"img_size": 64}, {"crop_pct": 0.5}, {"precision": "bf16"}):
        assert measure(net, images, **change).loss != plain.loss, change
    assert measure(net, images, img_size=64).input_size == (3, 64, 64)


def test_requests_that_cannot_work_are_refused(images, tmp_path):
    net = timm.create_model("test_resnet", num_classes=3)
    for data, more, message in [
        (tmp_path / "none", {}, "does not exist"),
        (images, {"split": "trial"}, "has no split 'trial'"),
        (images, {"precision": "fp16"}, "precision fp16: loss scaling needs a CUDA device"),
        (images, {"source": "wds/"}, "a stream has no access by index"),
        (images, {"img_size": 8192}, "need about|preprocessing"),
    ]:
        with pytest.raises(TrainError, match=message):
            measure(net, data, **more)
    with pytest.raises(TrainError, match=r"wanted a classifier, whose output is \(B, classes\)|has 3 classes"):
        measure(timm.create_model("test_resnet", num_classes=0), images)
    with pytest.raises(TrainError, match=r"does not run on a batch of \(4, 3, 100, 100\)"):
        measure(timm.create_model("test_vit", num_classes=3), images, img_size=100)
    with pytest.raises(TrainError, match="was not made by timm"):
        measure(torch.nn.Linear(2, 2), images)


def test_digits_need_no_folder():
    net = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    request = ValidationRequest(data=None, source="mnist5k", img_size=28, workers=0, batch_size=500)
    assert validate(net, request, device="cpu").images == 1000


def test_the_weights_do_not_change(run, images):
    net = load_net(run.last_checkpoint).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    measure(net, images)
    assert net.training and all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


RANKS = """
import json, sys
import timm, torch
from foveate.train import ValidationRequest, validate
torch.manual_seed(0)
net = timm.create_model("test_resnet", num_classes=3)
request = ValidationRequest(data=sys.argv[1], img_size=32, workers=0, batch_size=2)
result = validate(net, request, launcher=sys.argv[3], device="cpu")
print(json.dumps([result.images, result.top1, result.loss, result.unreadable]), file=open(sys.argv[2], "w"))
"""


@pytest.mark.slow
def test_three_processes_give_what_one_gives(images, tmp_path):
    data = shutil.copytree(images / "val", tmp_path / "val")  # 9 images and one broken one: no multiple of 3 x 2
    (data / "ant" / "broken.png").write_bytes(b"")
    (tmp_path / "ranks.py").write_text(RANKS)
    found = []
    for launch, launcher in ([[sys.executable], "none"],
                             [[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"],
                              "pytorch"]):  # fmt: skip
        out = tmp_path / f"{launcher}.json"
        words = [*launch, "ranks.py", str(data), str(out), launcher]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(out.read_text()))
    assert found[0][:2] == found[1][:2] and found[0][3] == found[1][3] and found[0][0] == 9
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-5)
