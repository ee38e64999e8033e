"""Top-1 accuracy on a folder of class folders, of anything that maps a batch of images to logits."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from .._errors import first_line
from .errors import ExportError
from .inputs import decode_image, find_images, without_warnings
from .metadata import Metadata

Runs = Mapping[str, Callable[[Tensor], list[Tensor]]]


def class_folders(folder: str | Path) -> list[str]:
    """Return the names of the class folders, in the order of the classes."""
    return sorted(path.name for path in Path(folder).iterdir() if path.is_dir())


class _Labelled(Dataset):
    """Preprocessed images (C, H, W) of class folders, each with the index of its class."""

    def __init__(self, folder: str | Path, names: list[str], metadata: Metadata) -> None:
        self.files = [(path, i) for i, name in enumerate(names) for path in find_images(Path(folder, name))]
        self.channels = metadata.input_size[0]
        self.transform = create_transform(**metadata.transform_args)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, target = self.files[index]
        return self.transform(decode_image(path, self.channels)), target


def measure_top1(
    runs: Runs,
    metadata: Metadata,
    folder: str | Path,
    *,
    batch: int = 32,
    most: int | None = None,
) -> tuple[dict[str, float], int]:
    """Return the top-1 accuracy of each run, %, and the number of images. All runs see the same images.

    Args:
        runs: by name, from a preprocessed batch to the outputs, of which the first are logits (B, classes).
        metadata: preprocessing; its batch replaces `batch`, and images beyond the last whole batch are then left out.
        folder: one folder a class; classes in the order of their names, as ImageNet's synsets.
        most: images, spread evenly over the folder; None: all.

    Raises:
        ExportError: no images, an unreadable image, or another number of classes than the model has.
    """
    try:
        with without_warnings():
            names = class_folders(folder)
            images = _Labelled(folder, names, metadata)
            size = metadata.batch or batch
            chosen = range(len(images)) if most is None else _spread(len(images), most)
            loader = DataLoader(Subset(images, chosen), size, drop_last=metadata.batch is not None)
            return _measure(runs, loader, len(names))
    except ExportError:
        raise
    except Exception as error:  # readers and decoders raise many types
        raise ExportError(f"{folder}: {first_line(error)}") from error


def _spread(count: int, most: int) -> list[int]:
    return torch.linspace(0, count - 1, min(count, most)).long().tolist()


def _measure(runs: Runs, loader: DataLoader, classes: int) -> tuple[dict[str, float], int]:
    hits, seen = dict.fromkeys(runs, 0), 0
    for images, targets in loader:
        seen += len(targets)
        for name, run in runs.items():
            logits = run(images)[0]
            if logits.shape[-1] != classes:
                raise ExportError(f"the folder has {classes} classes, the model {logits.shape[-1]}")
            hits[name] += int((logits.argmax(-1) == targets).sum())
    if seen == 0:
        raise ExportError("wanted at least one batch of images")
    return {name: 100 * count / seen for name, count in hits.items()}, seen
