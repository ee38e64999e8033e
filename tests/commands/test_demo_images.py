"""The second chapter of the demo: own class folders are split, copied, fine-tuned on, exported and drawn."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from recipes import CLASSES, few_threads, write_images  # noqa: F401 - a fixture
from typer.testing import CliRunner

from foveate._errors import RequestError
from foveate.commands import demo
from foveate.commands._own_images import copy_images, find_images
from foveate.commands._own_start import (
    LEAST_EPOCHS,
    LUMA,
    MOST_EPOCHS,
    check_start,
    fine_tuning,
    start_from_name,
    start_from_run,
    widened,
)
from foveate.commands.main import app
from foveate.train import load_net, load_recipe, train
from foveate.train.checkpoints import list_epochs
from foveate.train.model import build_net

QUICK = ("--model", "test_resnet", "--img-size", "32", "--epochs", "2")


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """Three class folders of ten images, none of them square; the current folder is theirs."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "own", 10, seed=2)
    return tmp_path / "own"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """What the first chapter leaves, after a single epoch of a smaller model."""
    work_dir = tmp_path_factory.mktemp("first") / "train"
    quick = {"schedule.epochs": 1, "schedule.warmup_epochs": 0, "schedule.warmup_lr": None, "batch_size": 500}
    small = {"model.dims": (16, 32), "model.depths": (1, 1), "model.kernel_size": 3, "model.head_dim": 8}
    train("nat_micro_1xb64_mnist5k", work_dir=work_dir, cfg_options={**quick, **small})
    return work_dir


def test_own_images_train_a_model_that_is_exported_verified_and_drawn(own, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    done = run("--images", own, *QUICK)
    assert done.exit_code == 0, done.output
    out = Path("foveate-demo-images")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["recipe"], summary["epochs"], summary["img_size"]) == ("test_resnet", 2, 32)
    assert (summary["classes"], summary["train_images"], summary["held_out_images"]) == (list(CLASSES), 24, 6)
    assert summary["split"] == "20% of each class for validation, seed 0" and summary["unreadable"] == []
    assert summary["weights"].startswith("random") and 0 < summary["onnx_largest_difference_in_std"] < 1e-4
    assert "of 6 validation images" in done.stdout and "24 for training" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        *("images", "model", "model.onnx", "report.png", "summary.json", "train")
    ]
    assert "not drawn: saw neither attention" in done.stdout  # test_resnet has none
    net = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True).eval()
    assert net.pretrained_cfg["label_names"] == list(CLASSES) and net(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    answered = CliRunner().invoke(app, ["predict", str(out / "model.onnx"), str(own / "bee" / "0.png")])
    assert {entry["name"] for entry in json.loads(answered.stdout)["classes"]} == set(CLASSES)
    loss, top1, *pictures = figures[0].axes
    assert (loss.get_ylabel(), top1.get_ylabel()) == ("loss", "top-1 on held-out images, %")
    assert [list(line.get_xdata()) for line in (*loss.lines, *top1.lines)] == [[1, 2]] * 3
    shown = [axis for axis in pictures if axis.images]
    assert len(shown) == 6 and all("%" in axis.get_title() for axis in shown)
    assert shown[0].images[0].get_array().shape == (32, 32, 3)


def test_the_copies_are_the_split_and_the_seed_decides_it(own, tmp_path):
    def split(seed: int, name: str) -> list[str]:
        copies = copy_images(find_images(own), tmp_path / name, px=16, channels=3, seed=seed)
        assert copies.counts == {"train": 24, "val": 6}
        files = sorted((tmp_path / name).rglob("*.png"))
        assert len(files) == 30 and {min(Image.open(path).size) for path in files} == {20}  # 24 at most, never enlarged
        return [str(path.relative_to(tmp_path / name)) for path in files if "val" in path.parts]

    assert split(0, "a") == split(0, "b") != split(1, "c")


def test_large_images_are_copied_small(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (300, 200), 50 * i).save(tmp_path / "own" / name / f"{i}.jpg")
    copies = copy_images(find_images(tmp_path / "own"), tmp_path / "out", px=32, channels=3, seed=0)
    assert copies.counts == {"train": 2, "val": 2}
    with Image.open(next((tmp_path / "out").rglob("*.png"))) as image:
        assert (image.size, image.mode) == ((72, 48), "RGB")


def test_folders_that_are_split_already_stay_so_and_unreadable_images_are_named(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, "own")
    shutil.rmtree("own/val/cow")  # a class without validation images
    Path("own/train/bee/3.png").write_text("no image")
    Path("own/val/ant/broken.jpg").write_bytes(b"\xff\xd8\xff")
    done = run("--images", "own", *QUICK, "--out", "out")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("\n") == 1 and "2 unreadable images left out" in done.stderr
    assert "bee/3.png is not a readable image" in done.stderr and "ant/broken.jpg" in done.stderr
    summary = json.loads(Path("out/summary.json").read_text())
    assert (summary["train_images"], summary["held_out_images"], len(summary["unreadable"])) == (23, 6, 2)
    assert summary["split"] == "the folders of --images" and summary["classes"] == list(CLASSES)


def test_unreadable_images_are_left_out_before_the_split(own, tmp_path):
    (own / "bee" / "3.png").write_text("no image")
    copies = copy_images(find_images(own), tmp_path / "out", px=16, channels=3, seed=0)
    assert copies.counts == {"train": 23, "val": 6} and len(copies.unreadable) == 1


def test_without_a_model_the_weights_of_the_first_chapter_are_fine_tuned(own, digits):
    shutil.copytree(digits, "foveate-demo/train")
    done = run("--images", own, "--epochs", 1, "--img-size", 32, "--out", "out")
    assert done.exit_code == 0, done.output
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["recipe"] == "nat_mini" and summary["weights"] == "foveate-demo/train/epoch_1.pth"
    net = load_net(list_epochs(Path("out/train"))[0])
    assert net.get_submodule(net.pretrained_cfg["first_conv"]).in_channels == 3


def test_the_first_chapter_is_run_where_it_left_no_weights(own, digits, monkeypatch):
    asked = []

    def first(out, model, seed):
        asked.append((str(out), model.value, seed))
        shutil.copytree(digits, out / "train")

    def second(out, start, *rest):
        asked.append(str(start.checkpoint))
        raise RequestError("stop here")

    monkeypatch.setattr(demo, "run_demo", first)
    monkeypatch.setattr(demo, "run_own", second)
    done = run("--images", own, "--out", "out", "--seed", 4)
    assert asked == [("out/digits", "nat", 4), "out/digits/train/epoch_1.pth"]
    assert "no weights in foveate-demo: training on digits first" in done.stdout and "stop here" in done.stderr


def test_the_first_chapters_weights_of_another_model_are_not_taken(own, digits):
    shutil.copytree(digits, "foveate-demo/train")
    assert demo._first_weights("nat") == demo._first_weights(None) == Path("foveate-demo/train/epoch_1.pth")
    assert demo._first_weights("van") is None


def test_gray_weights_compute_of_rgb_what_they_computed_of_gray(digits, tmp_path):
    checkpoint = list_epochs(digits)[0]
    start = widened(start_from_run(checkpoint, None), tmp_path)
    assert start.in_chans == 3 and not start.widens and start.preprocessing["mean"] == (0.1307,) * 3
    recipe = load_recipe(fine_tuning(start, tmp_path, 10, 100, 0, 1), {"data.img_size": 28})
    rgb = torch.rand(4, 3, 28, 28)
    gray = (rgb * torch.tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
    net = build_net(recipe).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(rgb), load_net(checkpoint)(gray), rtol=1e-4, atol=1e-5)


def test_a_run_of_another_size_and_file_of_weights_are_starts_too(own, images, tmp_path):
    recipe = {"model": {"name": "test_resnet", "num_classes": 3}, "optimizer": {"lr": 1e-3}, "schedule": {"epochs": 1}}
    recipe |= {"data": {"root": str(images), "img_size": 24, "crop_pct": 0.8, "workers": 0}, "batch_size": 4}
    checkpoint = train(recipe, work_dir=tmp_path / "run").last_checkpoint
    start = start_from_run(checkpoint, None)
    assert (start.px, start.preprocessing["crop_pct"], start.far, start.widens) == (24, 0.8, False, False)
    done = run("--images", own, "--checkpoint", checkpoint, "--epochs", 1, "--out", "out")
    assert done.exit_code == 0, done.output
    assert json.loads(Path("out/summary.json").read_text())["weights"] == str(checkpoint)
    wrong = run("--images", own, "--checkpoint", checkpoint, "--model", "resnet18", "--out", "other")
    assert wrong.exit_code == 2 and "is a checkpoint of test_resnet, not of resnet18" in wrong.stderr
    torch.save(timm.create_model("test_resnet").state_dict(), "weights.pth")
    named = start_from_name("test_resnet", Path("weights.pth"), False, None)
    assert named.weights == "weights.pth" and not named.far
    unnamed = run("--images", own, "--checkpoint", "weights.pth", "--out", "other")
    assert unnamed.exit_code == 2 and "does not say which model it holds: name the model with --model" in unnamed.stderr


def test_a_model_of_fixed_size_is_built_for_the_images(tmp_path):
    start = start_from_name("test_vit", None, False, 64)
    assert start.keywords == {"img_size": (64, 64)} and start.px == 64
    assert build_net(fine_tuning(start, tmp_path, 2, 100, 0, 1))(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.parametrize("images", [2, 72, 10_000])
def test_the_length_of_the_run_follows_from_the_images(images, tmp_path):
    start = start_from_name("test_resnet", None, False, 64)
    recipe = fine_tuning(start, tmp_path, 2, images, 0, None)
    assert recipe.schedule.epochs == max(LEAST_EPOCHS, min(MOST_EPOCHS, round(4000 / images)))
    assert recipe.batch_size <= images and recipe.optimizer.lr == 1e-3
    large = fine_tuning(start_from_name("resnet50", None, True, 224), tmp_path, 2, 72, 0, None)
    assert LEAST_EPOCHS <= large.schedule.epochs < 10 and large.optimizer.lr == 3e-4
    assert fine_tuning(start, tmp_path, 2, images, 0, 7).schedule.epochs == 7


def make(folder: Path, **classes: int) -> Path:
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8)).save(folder / name / f"{i}.png")
    return folder


def test_folders_that_cannot_be_trained_on_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    loose = make(Path("loose"), **{".hidden": 3})
    Image.new("RGB", (8, 8)).save(loose / "a.png")
    cases = {
        "nowhere": "--images nowhere does not exist",
        "file": "--images file is not a folder",
        loose: "wanted a folder of images per class, found no folder, and 1 images",
        make(Path("one"), cat=5): "for two classes or more; found one, 'cat'",
        make(Path("few"), cat=5, dog=1): "class 'dog' has 1 images for training, wanted at least 2",
        make(Path("empty"), cat=5, dog=0): "class 'dog' has 0 images for training",
    }
    make(Path("split/train"), cat=2, dog=1)
    cases[make(Path("split/val"), cat=1, cow=1).parent] = "class 'cow' has validation images but no training images"
    make(Path("halves/train"), cat=3, dog=3)
    cases[make(Path("halves/test"), cat=2, dog=2).parent] = (
        "wanted class folders, or the folders train and val, got test, train: rename them, or give halves/train"
    )
    cases[make(Path("only/Train"), cat=3, dog=3).parent] = "or the folders train and val, got Train"
    before = sorted(Path().iterdir())
    for folder, message in cases.items():
        done = run("--images", folder, *QUICK)
        assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, (folder, done.output)
    assert sorted(Path().iterdir()) == before


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    assert find_images(make(tmp_path, train=3, bus=3, test=2)).classes == ["bus", "test", "train"]


def test_hidden_files_and_empty_folders_are_no_images(tmp_path):
    make(tmp_path / "train", cat=2, dog=2)
    make(tmp_path / "val", cat=1, cow=0)
    Image.new("RGB", (8, 8)).save(tmp_path / "train/cat/._0.png")
    make(tmp_path / "train/dog", **{".ipynb_checkpoints": 3})
    found = find_images(tmp_path)
    assert {name: len(files) for name, files in found.train.items()} == {"cat": 2, "dog": 2}
    copies = copy_images(found, tmp_path / "out", px=8, channels=3, seed=0)
    assert copies.counts == {"train": 4, "val": 1}


def test_class_names_keep_their_order_spaces_and_letters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a cat", "B", "b", "Zoë", "10", "9"]
    make(Path("own"), **dict.fromkeys(names, 3))
    done = run("--images", "own", *QUICK, "--out", "out")
    assert done.exit_code == 0, done.output
    classes = json.loads(Path("out/summary.json").read_text())["classes"]
    assert classes == ["9", "10", "a cat", "B", "b", "Zoë"]
    net = timm.create_model("local-dir:out/model", pretrained=True)
    assert net.pretrained_cfg["label_names"] == classes


def test_gif_and_webp_files_are_images(tmp_path):
    for path in list(make(tmp_path / "own", cat=2, dog=2).rglob("*.png")):
        Image.open(path).convert("L").save(path.with_suffix(".gif" if path.stem == "0" else ".webp"))
        path.unlink()
    copies = copy_images(find_images(tmp_path / "own"), tmp_path / "out", px=8, channels=3, seed=0)
    assert copies.counts == {"train": 2, "val": 2} and copies.unreadable == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "ninformer", "--img-size", "33"), "33"),
        (("--model", "test_resnet", "--checkpoint", "other.pth"), "other.pth"),
    ],
)
def test_a_model_that_cannot_start_is_refused_before_images_are_copied(own, options, message):
    torch.save(timm.create_model("test_vit").state_dict(), "other.pth")
    done = run("--images", own, *options, "--out", "out")
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.output
    assert not Path("out").exists()


def test_a_model_that_refuses_the_size_is_named(monkeypatch):
    class Refusing(torch.nn.Module):
        def forward(self, x):
            raise AssertionError(f"wanted 160 px, got {x.shape[-1]}")

    monkeypatch.setattr("foveate.commands._own_start.build_net", lambda recipe: Refusing())
    with pytest.raises(RequestError, match="test_vit refuses images of 64 px: wanted 160 px, got 64"):
        check_start(start_from_name("test_vit", None, False, 64), 3)


def test_the_report_holds_few_images_of_all_classes(own, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MOST_HELD_OUT", 8)
    net = timm.create_model("test_resnet", num_classes=3)
    images, classes = demo._held_out_copies(own, list(CLASSES), 3, net)  # 10 of each class: every fourth
    assert len(images) == len(classes) == 8 and set(classes.tolist()) == {0, 1, 2}


def test_a_checkpoint_of_the_first_chapter_may_be_named_with_its_model(digits):
    checkpoint = list_epochs(digits)[0]
    assert demo._start("nat", checkpoint, False, 32, own=False).model == "nat_mini"
    with pytest.raises(RequestError, match="is a checkpoint of nat_mini, not of van"):
        demo._start("van", checkpoint, False, 32, own=False)


def test_a_class_without_readable_images_is_refused_and_nothing_is_copied(own, tmp_path):
    for path in (own / "ant").iterdir():
        path.write_text("no image")
    with pytest.raises(RequestError, match=r"class 'ant' has too few readable images .*10 unreadable images left out"):
        copy_images(find_images(own), tmp_path / "out", px=16, channels=3, seed=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "resnet51"), "--model: unknown model 'resnet51'"),
        (("--checkpoint", "nowhere.pth"), "checkpoint nowhere.pth does not exist"),
        (("--checkpoint", "a.pth", "--pretrained", "--model", "test_resnet"), "or --pretrained, not both"),
        (("--pretrained",), "--pretrained: name a model of timm with --model"),
        (("--out", "own/out"), "--out own/out is inside --images"),
        (("--out", "own"), "--out own is inside --images"),
        (("--out", "link/out"), "--out link/out is inside --images"),
        (("--epochs", "0"), "Invalid value for '--epochs'"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(own, options, message):
    Path("link").symlink_to(own)
    done = run("--images", "own", *options)
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.output
    assert not Path("foveate-demo-images").exists()


def test_an_interrupted_run_says_where_files_are(own, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupt)
    done = run("--images", own, *QUICK, "--out", "out")
    assert done.exit_code == 130 and "interrupted; complete files stay in out" in done.stderr
    assert Path("out/images/train/ant").is_dir()
