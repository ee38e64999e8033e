"""Streams: every image of an epoch once, whatever the number of workers; the same order for the same seed and epoch."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from foveate.train import MissingPackageError, TrainError, load_recipe, read_scalars, streams, train
from foveate.train.checkpoints import read_checkpoint
from foveate.train.data import build_loaders

CLASSES = ("ant", "bee", "cow")


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory) -> Path:
    """The images as WebDataset shards: two of 12 for training, one of 9 for validation."""
    pytest.importorskip("webdataset")
    root = tmp_path_factory.mktemp("shards")
    splits = {}
    for split, folder, count in (("train", "train", 2), ("validation", "val", 1)):
        files = sorted((images / folder).glob("*/*.png"))
        names = [f"{split}-{i:04d}.tar" for i in range(count)]
        for i, name in enumerate(names):
            with tarfile.open(root / name, "w") as archive:
                for path in files[i::count]:
                    key, label = f"{path.parent.name}{path.stem}", CLASSES.index(path.parent.name)
                    add(archive, f"{key}.png", path.read_bytes())
                    add(archive, f"{key}.cls", str(label).encode())
                    add(archive, f"{key}.json", json.dumps({"kind": label}).encode())
        lengths = [len(files[i::count]) for i in range(count)]
        splits[split] = {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": len(files)}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


@pytest.fixture(scope="module")
def parquet(images: Path, tmp_path_factory) -> Path:
    """The images as parquet files of Hugging Face, two for each split."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    for split, folder in (("train", "train"), ("validation", "val")):
        files = sorted((images / folder).glob("*/*.png"))
        for i in range(2):
            part = files[i::2]
            rows = {"image": [str(p) for p in part], "label": [CLASSES.index(p.parent.name) for p in part]}
            datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}-{i}.parquet")
    return root


def wds(root: Path, **more):
    return {"source": "wds/", "root": str(root), **more}


def hfids(root: Path, cache: Path, **more):
    return {"source": f"hfids/{root}", "root": str(cache), "train_samples": 24, "val_samples": 9, **more}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_webdataset_shows_each_image_of_an_epoch_once(make_recipe, shards, workers):
    train_loader, val_loader, classes = build_loaders(load_recipe(make_recipe(data=wds(shards, workers=workers))))
    assert classes is None and len(train_loader) == 6 and len(val_loader.dataset) == 9
    targets = [t for _, batch in train_loader for t in batch.tolist()]
    assert Counter(targets) == {0: 8, 1: 8, 2: 8}
    assert Counter(t for _, batch in val_loader for t in batch.tolist()) == {0: 3, 1: 3, 2: 3}


def test_the_order_follows_from_seed_and_epoch(make_recipe, shards):
    def order(epoch, seed=0):
        loader = build_loaders(load_recipe(make_recipe(data=wds(shards), seed=seed)))[0]
        for before in range(2):  # epochs before do not matter
            loader.dataset.set_epoch(before)
            list(loader)
        loader.dataset.set_epoch(epoch)
        return [tuple(images.sum((1, 2, 3)).tolist()) for images, _ in loader]

    assert order(3) == order(3)
    assert len({tuple(order(epoch)) for epoch in range(3)} | {tuple(order(0, seed=1))}) == 4


def test_labels_come_from_a_field_of_the_json_file(make_recipe, shards):
    loader = build_loaders(load_recipe(make_recipe(data=wds(shards, label_key="kind"))))[1]
    assert sorted(t for _, batch in loader for t in batch.tolist()) == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("kind", ["wds", pytest.param("hfids", marks=pytest.mark.slow)])  # waits 5 s an epoch
def test_a_recipe_trains_on_a_stream(make_recipe, shards, parquet, tmp_path, kind):
    data = wds(shards) if kind == "wds" else hfids(parquet, tmp_path / "cache")
    learner = {"name": "nat_mini", "dims": (32,), "depths": (1,), "kernel_size": 3, "num_classes": 3}
    recipe = make_recipe(model=learner, data=data, schedule={"epochs": 6}, optimizer={"lr": 3e-3})
    result = train(recipe, work_dir=tmp_path / "run", device="cpu")
    records = read_scalars(result.log)
    assert records[-1]["iter"] == 36 and result.best_top1 > 60
    assert all((record["val_top1"] * 9 / 100) % 1 == pytest.approx(0, abs=1e-6) for record in records)
    assert read_checkpoint(result.last_checkpoint)["meta"]["classes"] == (None if kind == "wds" else list(CLASSES))
    for path in result.work_dir.glob("epoch_6.pth"):
        path.unlink()
    again = train(recipe, work_dir=tmp_path / "run", resume=True, device="cpu")
    strip = [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in records]
    assert [{k: r[k] for k in strip[0]} for r in read_scalars(again.log)] == strip


def test_streams_that_cannot_work_are_refused(make_recipe, shards, tmp_path, monkeypatch):
    for change, message in [
        (wds(shards, workers=3), "data.workers: 'train' has 2 shards, fewer than its 3 readers"),
        (wds(shards, train_split="trial"), "cannot open 'trial'"),
        (wds(tmp_path), "cannot open 'train'"),
        (wds(shards, val_split="validation-0000.tar"), "data.val_samples: wds/ does not tell how many images"),
    ]:
        with pytest.raises(TrainError, match=message):
            build_loaders(load_recipe(make_recipe(data=change)))
    monkeypatch.setattr(streams, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'needs webdataset: pip install "foveate\[streams\]"'):
        build_loaders(load_recipe(make_recipe(data=wds(shards))))


def test_hugging_faces_stream_names_a_missing_column(make_recipe, parquet, tmp_path):
    with pytest.raises(TrainError, match=r"data.label_key: hfids/.* has no column 'kind'; known: image, label"):
        build_loaders(load_recipe(make_recipe(data=hfids(parquet, tmp_path, label_key="kind"))))


RANKS = """
import json, sys
from mmengine.dist import get_rank
from torch import distributed
from foveate.train import load_recipe
from foveate.train.data import build_loaders
distributed.init_process_group("gloo")
train_loader, val_loader, _ = build_loaders(load_recipe(json.loads(sys.argv[1])))
found = [[t for _, batch in loader for t in batch.tolist()] for loader in (train_loader, val_loader)]
open(f"{sys.argv[2]}/{get_rank()}.json", "w").write(json.dumps(found))
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_out_the_shards_and_count_each_validation_image_once(make_recipe, shards, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ranks.py"]
    words = [*launch, json.dumps(make_recipe(data=wds(shards))), str(tmp_path)]
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert Counter(parts[0][0] + parts[1][0]) == {0: 8, 1: 8, 2: 8} and len(parts[0][0]) == 12
    assert Counter(parts[0][1] + parts[1][1]) == {0: 3, 1: 3, 2: 3}


def test_a_broken_image_in_a_shard_does_not_end_the_run(make_recipe, shards, tmp_path):
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with tarfile.open(tmp_path / "train-0001.tar", "w") as archive:
        for i in range(11):
            buffer = io.BytesIO()
            Image.new("RGB", (20, 20), (i, i, i)).save(buffer, "PNG")
            add(archive, f"{i}.png", buffer.getvalue())
            add(archive, f"{i}.cls", b"1")
        add(archive, "11.png", b"no image")
        add(archive, "11.cls", b"2")
    loader = build_loaders(load_recipe(make_recipe(data=wds(tmp_path))))[0]
    assert sum(len(targets) for _, targets in loader) == 24
