"""Lists of files, class maps, compressed tars: the same images and classes as the folder that they describe."""

import csv
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from foveate.train import TrainError, load_recipe
from foveate.train.data import build_loaders
from foveate.train.lists import read_class_map
from foveate.train.sources import find_split


def seen(recipe, **options):
    """Return the images and classes of the validation split, in order, and the class names."""
    _, val, classes = build_loaders(load_recipe(recipe, options))
    batches = [tuple(batch) for batch in val]
    return torch.cat([images for images, _ in batches]), torch.cat([t for _, t in batches]).tolist(), classes


@pytest.fixture
def own(images: Path, tmp_path: Path) -> Path:
    return shutil.copytree(images, tmp_path / "own")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "foveate"


def write_list(root: Path, name: str, label=lambda folder: folder, header=("image", "label")) -> None:
    for split in ("train", "val"):
        rows = [(str(p.relative_to(root)), label(p.parent.name)) for p in sorted((root / split).glob("*/*.png"))]
        with (root / f"{split}{name}").open("w", newline="") as file:
            if name == ".csv":
                csv.writer(file).writerows([header, *rows])
            else:
                file.writelines(f"{path} {text}\n" for path, text in rows)


def as_list(root, **more):
    return {"source": "list", "root": str(root), **more}


@pytest.mark.parametrize("name", [".csv", ".txt"])
def test_a_list_gives_what_its_folder_gives(make_recipe, own, name):
    write_list(own, name)
    images, targets, classes = seen(make_recipe())
    listed = seen(make_recipe(data=as_list(own)))
    assert torch.equal(listed[0], images) and listed[1:] == (targets, classes)


def test_columns_have_any_names_and_numbers_are_indices(make_recipe, own):
    write_list(own, ".csv", {"ant": 2, "bee": 0, "cow": 1}.get, header=("file", "kind"))
    data = as_list(own, image_key="file", label_key="kind")
    _, targets, classes = seen(make_recipe(data=data))
    assert classes is None and targets == [2] * 3 + [0] * 3 + [1] * 3
    for key, message in (("image_key", "data.image_key: .* has no column 'image'; known: file, kind"),
                         ("label_key", "data.label_key: .* has no column 'label'")):  # fmt: skip
        with pytest.raises(TrainError, match=message):
            seen(make_recipe(data={**data, key: None}))


def test_a_class_map_decides_the_order_and_the_choice_of_classes(make_recipe, own, tmp_path):
    (tmp_path / "map.txt").write_text("cow\nant\n")
    chosen = {"root": str(own), "class_map": str(tmp_path / "map.txt")}
    _, targets, classes = seen(make_recipe(data=chosen, model={"num_classes": 2}))
    assert classes == ["cow", "ant"] and sorted(targets) == [0] * 3 + [1] * 3
    write_list(own, ".csv")
    (tmp_path / "map.txt").write_text("cow\nant\nbee\n")
    _, targets, classes = seen(make_recipe(data=as_list(own, class_map=str(tmp_path / "map.txt"))))
    assert classes == ["cow", "ant", "bee"] and targets == [1] * 3 + [2] * 3 + [0] * 3


def test_a_class_map_that_names_no_images_is_refused(make_recipe, own, tmp_path):
    (tmp_path / "map.txt").write_text("ant\nbee\ncaw\n")
    for data in ({"root": str(own)}, as_list(own)):
        write_list(own, ".csv")
        with pytest.raises(TrainError, match=r"caw|label 'cow' is not among the 3 classes"):
            seen(make_recipe(data={**data, "class_map": str(tmp_path / "map.txt")}))


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.txt", "b\na\n", {"b": 0, "a": 1}),
        ("a.json", '["b", "a"]', {"b": 0, "a": 1}),
        ("a.json", '{"b": 4, "a": 2}', {"b": 4, "a": 2}),
    ],
)
def test_class_maps_are_read(tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    assert read_class_map(tmp_path / name) == found


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.txt", ""), ("a.txt", "a\na\n"), ("a.txt", "a\n\nb\n"), ("a.json", "3"), ("a.json", '{"a": -1}'),
     ("a.json", '{"a": 1, "b": 1}'), ("a.json", "[1]"), ("a.json", "{"), ("a.txt", None)],
)  # fmt: skip
def test_class_maps_that_make_no_sense_are_refused(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(TrainError, match="class map"):
        read_class_map(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\n", "lists no images"),
        ("image,label\ngone.png,a\n", "first image, .*gone.png, does not exist"),
        ("image,label\ntrain/ant/0.png,\n", "line 2: wanted an image and a label"),
        ("image;label\n", "has no column 'image'"),
    ],
)
def test_lists_that_make_no_sense_are_refused(make_recipe, own, text, message):
    write_list(own, ".csv")
    (own / "train.csv").write_text(text)
    with pytest.raises(TrainError, match=message):
        seen(make_recipe(data=as_list(own)))


def test_a_text_list_has_no_columns_and_lines_of_two_words(make_recipe, own):
    write_list(own, ".txt")
    with pytest.raises(TrainError, match=r"data.label_key: .*train.txt has no columns"):
        seen(make_recipe(data=as_list(own, label_key="kind")))
    (own / "train.txt").write_text("alone\n")
    with pytest.raises(TrainError, match=r"line 1: wanted a path and a label, got 'alone'"):
        seen(make_recipe(data=as_list(own)))


@pytest.mark.parametrize("key", ["image_key", "label_key", "train_samples", "val_samples"])
def test_keys_without_effect_are_refused(make_recipe, key):
    with pytest.raises(TrainError, match=f"data.{key}: has no effect without"):
        load_recipe(make_recipe(data={key: 3 if key.endswith("samples") else "x"}))


def tar(root: Path, split: str, suffix: str) -> None:
    with tarfile.open(root / f"{split}{suffix}", "w:gz" if suffix.endswith("gz") else "w") as archive:
        for folder in sorted((root / split).iterdir()):
            archive.add(folder, arcname=folder.name)
    shutil.rmtree(root / split)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_a_tar_gives_what_its_folder_gives_and_is_decompressed_once(make_recipe, own, cache, suffix):
    images, targets, classes = seen(make_recipe())
    for split in ("train", "val"):
        tar(own, split, suffix)
    for _ in range(2):
        packed = seen(make_recipe(data={"root": str(own)}))
        assert torch.equal(packed[0], images) and packed[1:] == (targets, classes)
    assert len(list(cache.glob("*.tar")) if cache.exists() else []) == (0 if suffix == ".tar" else 2)


def test_a_damaged_compressed_tar_is_refused_and_leaves_nothing(make_recipe, own, cache):
    tar(own, "train", ".tar.gz")
    whole = (own / "train.tar.gz").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no gzip file"):
        (own / "train.tar.gz").write_bytes(damaged)
        with pytest.raises(TrainError, match=r"train.tar.gz is truncated or damaged"):
            seen(make_recipe(data={"root": str(own)}))
        assert not list(cache.iterdir())


def test_a_folder_of_one_tar_per_class_gives_what_class_folders_give(make_recipe, own):
    images, targets, classes = seen(make_recipe())
    for split in ("train", "val"):
        for folder in sorted((own / split).iterdir()):
            with tarfile.open(own / split / f"{folder.name}.tar", "w") as archive:
                for path in folder.iterdir():
                    archive.add(path, arcname=path.name)
            shutil.rmtree(folder)
    packed = seen(make_recipe(data={"root": str(own)}))
    assert sorted(packed[1]) == targets and packed[2] == classes
    by_class = [sorted(x[[i for i, t in enumerate(y) if t == 1]].sum((1, 2, 3)).tolist()) for x, y in
                ((images, targets), packed[:2])]  # fmt: skip
    assert by_class[0] == by_class[1]


def test_evaluation_finds_its_images(own, tmp_path):
    assert find_split(own, None) == own / "val" and find_split(own, "train") == own / "train"
    assert find_split(own / "val", None) == own / "val"
    write_list(own, ".csv")
    assert find_split(own / "val.csv", None) == own / "val.csv"
    shutil.rmtree(own / "val")
    assert find_split(own, None) == own / "val.csv"
    (own / "val.csv").unlink()
    with pytest.raises(TrainError, match=r"has no validation split, but train, train.csv: name one with --split"):
        find_split(own, None)
    (tmp_path / "a.zip").touch()
    for path, message in ((tmp_path / "none", "does not exist"), (tmp_path / "a.zip", "wanted a folder, or a file")):
        with pytest.raises(TrainError, match=message):
            find_split(path, None)


def test_hugging_faces_columns_have_any_names(make_recipe, own, tmp_path):
    datasets = pytest.importorskip("datasets")
    for split in ("train", "validation"):
        folder = own / ("train" if split == "train" else "val")
        files = sorted(folder.glob("*/*.png"))
        numbers = [("ant", "bee", "cow").index(path.parent.name) for path in files]
        features = datasets.Features(
            {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["ant", "bee", "cow"])}
        )
        rows = {"photo": [str(path) for path in files], "kind": numbers}
        (tmp_path / "hf").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hf" / f"{split}-0.parquet")
    images, targets, classes = seen(make_recipe())
    data = {
        "source": f"hfds/{tmp_path / 'hf'}",
        "root": str(tmp_path / "cache"),
        "image_key": "photo",
        "label_key": "kind",
    }
    found = seen(make_recipe(data=data))
    assert torch.equal(found[0], images) and found[1:] == (targets, classes)
    for key in ("image_key", "label_key"):
        with pytest.raises(TrainError, match=f"data.{key}: .* has no column"):
            seen(make_recipe(data={**data, key: None}))


def test_an_image_outside_the_list_is_not_read(make_recipe, own):
    write_list(own, ".csv")
    Image.new("RGB", (8, 8)).save(own / "train" / "ant" / "extra.png")
    train, _, _ = build_loaders(load_recipe(make_recipe(data=as_list(own))))
    assert len(train.dataset) == 24


def test_json_class_maps_reach_the_model(make_recipe, own, tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"cow": 0, "bee": 1, "ant": 2}))
    _, targets, _ = seen(make_recipe(data={"root": str(own), "class_map": str(tmp_path / "map.json")}))
    assert targets[:3] == [2, 2, 2]
