"""`foveate prune MODEL -o OUT`: load, plan, cut or mask, compare, and only then write a hub folder and the plan."""

from copy import deepcopy
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision import transforms

from .._files import atomic_path
from ..export import load_model, save_hub
from ..export.files import check_empty_folder
from ..pruning import CRITERIA, Plan, PruningError, plan
from ..pruning.counts import example_image
from ..pruning.criteria import Batches, check_has_data
from ..pruning.targets import Latency, macs_of, plan_until
from ..train.data import ToMode, draw_batches
from ..train.recipe import DataRecipe
from ._options import (
    MAX_BATCH,
    MAX_BATCHES,
    MAX_SEED,
    Checkpoint,
    ImgSize,
    ModelArgs,
    ModelName,
    Pretrained,
    name_weights,
    parse_model_args,
    split_names,
)
from ._terminal import print_facts

PLAN_FILE = "plan.json"
DIGITS = "mnist5k"
LATENCY_BATCH, DATA_BATCH, BATCHES = 1, 32, 8  # defaults
TOLERANCE = 1e-4  # largest difference between the pruned and the masked model, in std of the logits


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
    model: ModelName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new or empty.")],
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    method: Annotated[
        Method, typer.Option(help="How weights are scored; taylor and head_importance (of heads) need --data.")
    ] = Method.DIMAP,
    ratio: Annotated[float | None, typer.Option(help="Share to remove, 0 to below 1.", show_default="0.5")] = None,
    structure: Annotated[
        str | None, typer.Option(help="Cut whole structures: heads, channels, mlp, conv, width; comma-separated.")
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            help="Zero single weights of: qkv, prj, mlp, conv, depthwise, gate; comma-separated.",
            show_default="qkv,prj,mlp,conv",
        ),
    ] = None,
    scope: Annotated[
        Scope | None,
        typer.Option(
            help="What is ranked together. `layer` gives the largest speed-up with --structure: `group` removes most "
            "structures in late stages, where feature maps are small.",
            show_default="group for structures, otherwise the method's own",
        ),
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="2:4 keeps two of every four neighboring weights.")] = None,
    target_macs: Annotated[
        float | None, typer.Option(help="Find the lowest ratio with at most this many GMACs.")
    ] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(help="Find the lowest ratio with at most this latency of a batch, ms."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help=f"Folder with train/CLASS/IMAGE, or {DIGITS}."),
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
            help="Images per batch.",
            show_default=f"{DATA_BATCH} of --data, {LATENCY_BATCH} for --target-latency",
        ),
    ] = None,
    img_size: ImgSize = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Random seed (scores of `random`, image sampling).")
    ] = 0,
    model_arg: ModelArgs = None,
) -> None:
    """Prune a model: zero single weights, or cut whole structures, which leaves smaller layers."""
    check_empty_folder(output)
    _check_one_goal(ratio, target_macs, target_latency, structure)
    _check_data(method, data, batches, None if target_latency is not None else batch)
    loaded = load_model(model, checkpoint, pretrained=pretrained, **parse_model_args(model_arg))
    options: dict[str, Any] = {
        "structure": split_names(structure, "--structure") or (),
        "groups": split_names(groups, "--groups"),
        "scope": None if scope is None else scope.value,
        "pattern": pattern,
        "batches": None if data is None else _draw(data, loaded, batches, batch, img_size, seed),
        "img_size": img_size,
        "seed": seed,
    }

    def make(share: float) -> Plan:
        return plan(loaded, method.value, share, **options)

    if target_macs is not None:
        chosen = plan_until(loaded, make, macs_of, target_macs, unit="GMACs")
    elif target_latency is not None:
        latency = Latency(batch or LATENCY_BATCH, img_size=img_size)
        chosen = plan_until(loaded, make, latency, target_latency, unit="ms")
    else:
        chosen = make(0.5 if ratio is None else ratio)
    pruned, difference = _follow(chosen, loaded)
    _write(output, chosen, pruned)
    Console().print(chosen.table())
    print_facts("foveate prune", _facts(output, chosen, difference, name_weights(model, checkpoint, pretrained)))


def _check_one_goal(
    ratio: float | None, target_macs: float | None, target_latency: float | None, structure: str | None
) -> None:
    if sum(goal is not None for goal in (ratio, target_macs, target_latency)) > 1:
        raise PruningError("give one of --ratio, --target-macs and --target-latency")
    if target_latency is not None and not structure:
        raise PruningError(
            "--target-latency: zeroed weights do not reduce latency; choose what to cut with --structure"
        )


def _check_data(method: Method, data: str | None, batches: int | None, batch: int | None) -> None:
    check_has_data(method.value, data)
    if data is not None and not CRITERIA[method.value].needs_data:
        raise PruningError(f"--data: {method.value} does not use images")
    if batches is not None and data is None:
        raise PruningError("--batches: needs --data")
    if batch is not None and data is None:
        raise PruningError("--batch: needs --data or --target-latency")


def _draw(
    data: str,
    model: nn.Module,
    batches: int | None,
    batch: int | None,
    img_size: int | tuple[int, int] | None,
    seed: int,
) -> Batches:
    """Draw images of the training split, preprocessed as the model's pretrained_cfg says."""
    source = DataRecipe(DIGITS) if data == DIGITS else DataRecipe("folder", data)
    channels, *size = example_image(model, img_size).shape[1:]
    config = resolve_data_config(model=model)
    steps = create_transform(**config | {"input_size": (channels, *size)})
    transform = transforms.Compose([ToMode(channels), *steps.transforms])
    sizes = {"batches": batches or BATCHES, "batch_size": batch or DATA_BATCH}
    return draw_batches(source, transform, model.num_classes, **sizes, seed=seed)  # type: ignore[arg-type]


def _follow(chosen: Plan, model: nn.Module) -> tuple[nn.Module, float | None]:
    """Return the pruned model; for cuts also its difference from the masked model, in std of the logits."""
    masked = chosen.apply(deepcopy(model))
    if not chosen.structure:
        return masked, None
    smaller = chosen.cut(model)
    image = example_image(model, chosen.counts.input_size[1:])
    images = torch.randn(2, *image.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = masked(images)
        difference = float((smaller(images) - wanted).abs().max() / wanted.std())
    if not difference <= TOLERANCE:  # written so that a NaN fails
        raise PruningError(f"the pruned model differs from the masked model by {difference:.2g} std of the logits")
    return smaller, difference


def _write(output: Path, chosen: Plan, pruned: nn.Module) -> None:
    with atomic_path(output) as part:
        save_hub(pruned, part)
        chosen.save(part / PLAN_FILE)


def _facts(output: Path, chosen: Plan, difference: float | None, weights: str) -> dict[str, str]:
    counts = chosen.counts
    removed = {f"{kind} removed": f"{some} of {total}" for kind, (some, total) in chosen.removed.items()}
    return {
        "written": str(output),
        "weights": weights,
        "method": f"{chosen.method}, ratio {chosen.ratio:.3g}, ranked per {chosen.scope}",
        **removed,
        "parameters": f"{counts.params_before / 1e6:.2f} M -> {counts.params_after / 1e6:.2f} M",
        "multiply-adds": f"{counts.macs_before / 1e9:.3f} G -> {counts.macs_after / 1e9:.3f} G",
        "counted by": "non-zero weights" if not chosen.structure else "shapes",
        "max. logit difference, pruned vs. masked": "-" if difference is None else f"{difference:.1e} (in std)",
        "load with": f'timm.create_model("local-dir:{output}", pretrained=True)',
    }
