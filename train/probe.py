"""Accuracy of a frozen backbone's features: nearest neighbors and a linear classifier, through scikit-learn.

Features are the pooled outputs before the classifier, of images without augmentation: those of the training split are
fitted, those of the validation split are counted.
"""

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from .._errors import first_line
from .._modes import evaluating
from ..export.metadata import metadata_of
from .data import ToMode
from .errors import MissingPackageError, TrainError
from .launch import check_precision, choose_device
from .model import DTYPES
from .recipe import DataRecipe, Precision
from .sources import class_names, open_split
from .validate import Samples, collate_samples

Method = Literal["knn", "linear"]


@dataclass(frozen=True)
class ProbeRequest:
    """What is measured, and how."""

    data: str | Path | None  # folder with training and validation split; None: mnist5k
    source: str = "folder"  # as data.source of a recipe
    method: Method = "knn"
    neighbors: int = 20  # of method knn; votes are weighted by cosine similarity
    regularization: float = 1.0  # of method linear: scikit-learn's C, on standardized features
    img_size: int | tuple[int, int] | None = None  # px, or (height, width); None: the model's own
    batch_size: int = 64
    workers: int = 4
    precision: Precision = "fp32"


@dataclass(frozen=True)
class ProbeResult:
    top1: float  # %, of the validation images
    train_images: int
    images: int
    unreadable: tuple[str, ...]
    features: int
    seconds: float


def probe(model: nn.Module, request: ProbeRequest, *, device: str | None = None) -> ProbeResult:
    """Measure the features of a timm model. Its weights do not change.

    Raises:
        TrainError: the data cannot be opened, the model has no features before its classifier, or there are fewer
            training images than neighbors.
        MissingPackageError: scikit-learn is not installed.
    """
    if find_spec("sklearn") is None:
        raise MissingPackageError('probes need scikit-learn: pip install "foveate[probe]"')
    start = time.perf_counter()
    place = choose_device(device)
    check_precision(request.precision, place)
    splits, lost = [], []
    classes: list[str] | None = None
    for split in ("train", "validation"):
        samples, classes = _open(model, request, split, classes)
        features, targets, unreadable = _features(model.to(place), samples, request, place)
        if not len(features):
            raise TrainError(f"{request.data}: no image of {split} can be read, the first is {unreadable[0]}")
        splits.append((features, targets))
        lost += unreadable
    (train, train_targets), (val, val_targets) = splits
    if request.method == "knn" and len(train) < request.neighbors:
        raise TrainError(f"wanted at least {request.neighbors} training images, one per neighbor, got {len(train)}")
    if len(np.unique(train_targets)) < 2:
        raise TrainError(f"{request.data}: wanted at least two classes of training images")
    fitted = _classifier(request).fit(train, train_targets)
    top1 = 100 * float((fitted.predict(val) == val_targets).mean())
    seconds = time.perf_counter() - start
    return ProbeResult(top1, len(train), len(val), tuple(sorted(lost)), train.shape[1], seconds)


def _classifier(request: ProbeRequest) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if request.method == "linear":
        return make_pipeline(StandardScaler(), LogisticRegression(C=request.regularization, max_iter=2000))
    return KNeighborsClassifier(request.neighbors, metric="cosine", weights=_similarity)


def _similarity(distances: np.ndarray) -> np.ndarray:
    return np.maximum(1 - distances, 0) + 1e-9  # cosine distance to similarity; a vote is never 0


def _open(
    model: nn.Module, request: ProbeRequest, split: str, classes: list[str] | None
) -> tuple[Samples, list[str] | None]:
    metadata = metadata_of(model, request.img_size)
    if metadata is None:
        raise TrainError(f"{type(model).__name__} was not made by timm: its preprocessing is unknown")
    root = None if request.data is None else str(request.data)
    data = DataRecipe(source=request.source, root=root)
    dataset = open_split(data, split, transforms.Compose([]), fixed=False, classes=classes)
    steps = create_transform(**metadata.transform_args)
    transform = transforms.Compose([ToMode(metadata.input_size[0]), *steps.transforms])
    return Samples(dataset, transform, None), classes or class_names(dataset)


@torch.inference_mode()
def _features(
    model: nn.Module, samples: Samples, request: ProbeRequest, place: torch.device
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return features (N, C) float32, classes (N,), and the names of images that could not be read."""
    loader = DataLoader(samples, request.batch_size, num_workers=request.workers, collate_fn=collate_samples)
    features: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    lost: list[str] = []
    with evaluating(model):
        for images, classes, _, unreadable in loader:
            lost += unreadable
            if images is not None:
                features.append(_pooled(model, images.to(place), request.precision).cpu().numpy())
                targets.append(classes.numpy())
    if not features:
        return np.empty((0, 0), np.float32), np.empty(0, np.int64), lost
    return np.concatenate(features), np.concatenate(targets), lost


def _pooled(model: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    dtype = DTYPES[precision]
    try:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            maps = model.forward_features(images)  # type: ignore[operator]  # of timm's models
            pooled = model.forward_head(maps, pre_logits=True)  # type: ignore[operator]
    except Exception as error:  # models raise many types
        raise TrainError(f"{type(model).__name__} gives no features: {first_line(error)}") from error
    pooled = pooled.float().flatten(1)
    if not pooled.isfinite().all():
        raise TrainError(f"{type(model).__name__}: its features are not finite")
    return pooled
