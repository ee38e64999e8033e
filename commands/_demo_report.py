"""What both chapters of `foveate demo` do with a trained model: measure, save, export, verify, draw and sum up."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from .._errors import RequestError, first_line
from .._files import atomic_path
from .._version import __version__
from ..analysis import draw_views, layer_views, write_figure
from ..analysis.drawing import picture_of
from ..export import Agreement, export_onnx, save_hub, verify
from ..train import TrainResult, evaluate, load_net, read_scalars

VERIFIED_IMAGES = 64
RUN_BATCH = 50  # images of a batch of the predictions that are drawn
MOST_LETTERS = 14  # of a class name in a title
Load = Callable[[nn.Module], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Chapter:
    """What differs between the chapters."""

    title: str  # of the run: a recipe's name, or a model's
    load: Load  # from the trained model to held-out images (N, C, H, W), preprocessed, and their classes (N,)
    labels: Sequence[str]  # class names
    grid: tuple[int, int]  # most rows and columns of images that are drawn
    colors: str | None = None  # color map of gray images
    facts: dict[str, Any] = field(default_factory=dict)  # more entries of summary.json


@dataclass(frozen=True)
class Demo:
    """What a demo wrote and measured."""

    title: str
    trained: TrainResult
    top1: float  # percent of the held-out images, of the last epoch's weights
    top5: float
    images: int
    agreement: Agreement
    parameters: int
    not_drawn: str | None  # why there is no attention.png
    seconds: float  # of the whole chapter


def finish(out: Path, trained: TrainResult, chapter: Chapter, seed: int, elapsed: Callable[[], float]) -> Demo:
    """Evaluate, save and export; write model/ (timm hub), model.onnx, report.png, attention.png and summary.json.

    Raises:
        ExportError: the exported file cannot be written, or does not agree with the model.
    """
    scores = evaluate(trained.last_checkpoint)
    loaded = load_net(trained.last_checkpoint)
    images, targets = chapter.load(loaded)
    save_hub(loaded, out / "model")
    with atomic_path(out / "model.onnx") as part:
        export_onnx(loaded, part, img_size=(images.shape[-2], images.shape[-1]))
        agreement = verify(loaded, part, images[:VERIFIED_IMAGES], batch_sizes=_batches(len(images)))
    draw(out / "report.png", read_scalars(trained.log), loaded, images, targets, chapter)
    not_drawn = draw_attention(out / "attention.png", loaded, images[:1])
    result = Demo(
        title=chapter.title,
        trained=trained,
        top1=scores.top1,
        top5=scores.top5,
        images=scores.images,
        agreement=agreement,
        parameters=sum(p.numel() for p in loaded.parameters()),
        not_drawn=not_drawn,
        seconds=elapsed(),
    )
    with atomic_path(out / "summary.json") as part:
        part.write_text(json.dumps(_summary(result, seed) | chapter.facts, indent=2) + "\n")
    return result


def _batches(images: int) -> tuple[int, ...]:
    """Two batch sizes, so that a graph with a fixed batch fails; one where there is a single image."""
    most = min(images, VERIFIED_IMAGES)
    return (1, most - 1) if most > 1 else (1,)


def draw(out: Path, scalars: list[dict], model: nn.Module, images: Tensor, targets: Tensor, chapter: Chapter) -> None:
    """Draw the curves of the run, and held-out images with predictions: mistakes first, then some of every class."""
    from matplotlib.figure import Figure

    with torch.inference_mode():
        probabilities = torch.cat([model(batch).softmax(1) for batch in images.split(RUN_BATCH)])
    confidences, answers = probabilities.max(1)
    chosen = worth_drawing(answers == targets, chapter.grid[0] * chapter.grid[1])
    columns = min(chapter.grid[1], len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(11, 3.2 + 1.2 * rows * 10 / max(columns, 6)), layout="constrained")
    curves, shown = figure.subfigures(2, height_ratios=(3.2, 1.2 * rows * 10 / max(columns, 6)))  # type: ignore[misc]
    _draw_curves(curves, scalars)
    axes = list(shown.subplots(rows, columns, squeeze=False).flat)
    config = resolve_data_config(model=model)
    for axis in axes:
        axis.axis("off")
    for axis, i in zip(axes, chosen, strict=False):
        axis.imshow(_picture(images[i], config["mean"], config["std"]), cmap=chapter.colors)
        is_right = bool(answers[i] == targets[i])
        title = f"{_short(chapter.labels[int(answers[i])])} {confidences[i]:.0%}"
        title += "" if is_right else f"\nis {_short(chapter.labels[int(targets[i])])}"
        axis.set_title(title, fontsize=8, color="black" if is_right else "tab:red")
    with atomic_path(out) as part:
        figure.savefig(part, dpi=120)


def draw_attention(out: Path, model: nn.Module, image: Tensor) -> str | None:
    """Draw what the center of an image (1, C, H, W) sees in every layer, or return why there is no such picture."""
    config = resolve_data_config(model=model)
    try:
        figure = draw_views(picture_of(image[0], config["mean"], config["std"]), layer_views(model, image))
    except RequestError as error:
        return first_line(error)
    write_figure(figure, out)
    return None


def _draw_curves(figure: Any, scalars: list[dict]) -> None:
    epochs = [line["epoch"] for line in scalars]
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [line["train_loss"] for line in scalars], label="train (augmented)")
    left.plot(epochs, [line["val_loss"] for line in scalars], label="held out")
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    right.plot(epochs, [line["val_top1"] for line in scalars])
    right.set(xlabel="epoch", ylabel="top-1 on held-out images, %")


def _picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Any:
    """(C, H, W) preprocessed -> (H, W) gray or (H, W, 3) RGB, 0 to 1."""
    shift, factor = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (image * factor + shift).clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"


def worth_drawing(right: Tensor, count: int) -> list[int]:
    """Return indices of the first mistakes, and of right predictions spread over the classes (images are sorted)."""
    mistakes = (~right).nonzero().flatten()[:count]
    answers = right.nonzero().flatten()
    wanted = min(count - len(mistakes), len(answers))
    spread = torch.linspace(0, len(answers) - 1, wanted).long()
    return [*mistakes.tolist(), *answers[spread].tolist()]


def _summary(result: Demo, seed: int) -> dict[str, Any]:
    return {
        "recipe": result.title,
        "seed": seed,
        "top1_percent": result.top1,
        "top5_percent": result.top5,
        "held_out_images": result.images,
        "parameters": result.parameters,
        "epochs": result.trained.epochs,
        "training_seconds": round(result.trained.seconds, 1),
        "seconds": round(result.seconds, 1),
        "onnx_largest_difference": result.agreement.largest_absolute,
        "onnx_largest_difference_in_std": result.agreement.largest_relative,
        "onnx_images": result.agreement.images,
        "threads": torch.get_num_threads(),
        "versions": {"foveate": __version__, **{name: version(name) for name in ("torch", "timm", "mmengine", "onnx")}},
    }


def facts_of(out: Path, result: Demo, what: str) -> dict[str, str]:
    """Return the lines of the report; `what` the held-out images are, such as "held-out digits"."""
    return {
        "trained": result.title,
        "parameters": f"{result.parameters / 1e6:.2f} M",
        "top-1": f"{result.top1:.1f} % of {result.images} {what}, after the last epoch",
        "training": f"{result.trained.epochs} epochs in {result.trained.seconds:.0f} s",
        "ONNX": f"max. difference {result.agreement.largest_absolute:.1e} on {result.agreement.images} images",
        "checkpoints": str(out / "train"),
        "timm hub folder": str(out / "model"),
        "ONNX file": str(out / "model.onnx"),
        "curves and images": str(out / "report.png"),
        "attention": str(out / "attention.png") if result.not_drawn is None else f"not drawn: {result.not_drawn}",
        "summary": str(out / "summary.json"),
        "total time": f"{result.seconds:.0f} s",
    }
