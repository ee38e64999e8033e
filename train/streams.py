"""Streams of images through timm's readers: WebDataset shards (wds/) and Hugging Face's iterable data sets (hfids/).

A stream has no access by index. In training, timm's readers share out the shards among processes and workers, shuffle
them and their samples by (seed, epoch), and end an epoch after a fixed number of samples per worker. In validation
every process reads the whole stream and takes every n-th image, so that each image counts once.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.runner import Runner
from timm.data import create_dataset
from timm.data.dataset import IterableImageDataset
from torch.utils.data import DataLoader, IterableDataset

from .._errors import did_you_mean, first_line
from .errors import MissingPackageError, TrainError
from .images import seed_everything
from .lists import read_class_map
from .recipe import DataRecipe, Recipe

_PACKAGES = {"wds": "webdataset", "hfids": "datasets"}


class TrainStream(IterableDataset):
    """The part of a stream that this process trains on; its order depends on seed, epoch, process and workers only."""

    def __init__(self, dataset: IterableImageDataset, workers: int, seed: int) -> None:
        self.dataset = dataset
        self.reader = dataset.reader
        self.seed = seed
        self.generator = torch.Generator()  # of the loader: what workers draw begins with it
        dataset.set_loader_cfg(num_workers=workers)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Let all random numbers follow from the seed, the epoch and the process; what this process draws too."""
        numbers = (self.seed, epoch, get_dist_info()[0])
        seed_everything(*numbers)
        self.generator.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
        if hasattr(self.reader, "worker_seed"):  # WebDataset: a pipeline that goes on would depend on the epochs before
            self.reader.ds, self.reader.worker_seed = None, numbers[0] + 1_000_003 * epoch
        self.dataset.set_epoch(epoch)


class ValStream(IterableDataset):
    """A whole stream, of which this process takes every n-th image. Its length is that of the whole."""

    def __init__(self, dataset: IterableImageDataset, workers: int) -> None:
        self.dataset = dataset
        self.reader = dataset.reader
        self.part = get_dist_info()
        self.reader.dist_rank, self.reader.dist_num_replicas = 0, 1  # the reader shares out among workers only
        dataset.set_loader_cfg(num_workers=workers)

    def __len__(self) -> int:
        return self.reader.num_samples

    def __iter__(self) -> Iterator[Any]:
        rank, processes = self.part
        return islice(iter(self.dataset), rank, None, processes)


class StreamEpoch(Hook):
    """Tell a stream its epoch, from which it draws its order."""

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner: Runner) -> None:
        runner.train_dataloader.dataset.set_epoch(runner.epoch)


def stream_loader(
    recipe: Recipe, transform: Callable, collate: Callable, *, training: bool, **options: Any
) -> DataLoader:
    """Open a split of a stream, and return its loader.

    Args:
        transform: PIL image -> (C, H, W).
        collate: samples -> batch.
        training: of the training split, shuffled, or of the validation split.
        options: of the DataLoader.

    Raises:
        TrainError: the stream cannot be opened, does not tell its length, or has fewer shards than workers.
        MissingPackageError: its package is not installed.
    """
    dataset = _open(recipe, training)
    dataset.transform = transform
    workers = recipe.data.workers
    stream = TrainStream(dataset, workers, recipe.seed) if training else ValStream(dataset, workers)
    options |= {"generator": stream.generator} if isinstance(stream, TrainStream) else {}
    return DataLoader(stream, recipe.batch_size, num_workers=workers, collate_fn=collate, drop_last=training, **options)


def _open(recipe: Recipe, training: bool) -> IterableImageDataset:
    data, package = recipe.data, _PACKAGES[recipe.data.kind]
    split, count = (data.train_split, data.train_samples) if training else (data.val_split, data.val_samples)
    if find_spec(package) is None:
        raise MissingPackageError(f'data.source {data.source}: needs {package}: pip install "foveate[streams]"')
    image_key = data.image_key
    class_map: Any = None if data.class_map is None else read_class_map(Path(data.class_map))
    if data.kind == "wds" and image_key is not None and "jpg" not in image_key.split(";"):
        image_key = f"{image_key};jpg"  # timm calls the decoded image jpg
    try:
        dataset = create_dataset(
            data.source if "/" in data.source else f"{data.source}/",
            root=data.root,
            split=split,
            is_training=training,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            num_samples=count,
            class_map=class_map,
            input_key=image_key,
            target_key=data.label_key,
        )
    except TrainError:
        raise
    except Exception as error:  # readers raise many types
        hint = f"; give data.{_count_key(training)}" if "num_samples" in str(error) else ""
        raise TrainError(
            f"data.source {data.source} cannot open {split!r} of {data.root}: {first_line(error)}{hint}"
        ) from error
    _check(data, dataset.reader, split, training)
    return dataset


def _count_key(training: bool) -> str:
    return "train_samples" if training else "val_samples"


def _check(data: DataRecipe, reader: Any, split: str, training: bool) -> None:
    if not reader.num_samples:
        raise TrainError(f"data.{_count_key(training)}: {data.source} does not tell how many images {split!r} has")
    if data.kind == "wds" and training:
        shards = len(reader.split_info.filenames)
        readers = max(1, data.workers) * get_dist_info()[1]
        if shards < readers:
            raise TrainError(
                f"data.workers: {split!r} has {shards} shards, fewer than its {readers} readers (processes x workers), "
                "of which some would read nothing; lower data.workers"
            )
    if data.kind == "hfids":
        _check_columns(data, reader, split)


def _check_columns(data: DataRecipe, reader: Any, split: str) -> None:
    """Refuse missing columns, and take over the class names, which timm looks for where streams do not have them."""
    features = reader.builder.as_streaming_dataset(split=split).features or {}
    for option, key in (("image_key", data.image_key or "image"), ("label_key", data.label_key or "label")):
        if features and key not in features:
            raise TrainError(f"data.{option}: {data.source} has no column {key!r}" + did_you_mean(key, list(features)))
    names = getattr(features.get(data.label_key or "label"), "names", None)
    if names and not reader.class_to_idx:
        reader.class_to_idx = {name: index for index, name in enumerate(names)}
