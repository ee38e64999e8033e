"""Accuracy of pruned models on real digits: one-shot with several criteria, and after fine-tuning.

    python -m foveate.benchmarks.pruning_mnist5k --seeds 0 1 2 --out results.txt

Models       The micro models of the recipes for mnist5k, trained from scratch for each seed (--epochs replaces the
             recipe's number); last epoch.
One-shot     Top-1 on the 1000 held-out digits right after a share of the weights of QKV, PRJ and MLP was zeroed. Every
             method zeroes the same share: DIMAP ranks within each module group, the others over all groups, magnitude
             also within each group and each layer (uniform).
Fine-tuned   If there is a recipe with -dimap: after fine-tuning for a third of the epochs, with the zeros kept; also
             for the model with half of its heads and hidden channels cut by summed DIMAP scores.
"""

import statistics
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from ..export import save_hub
from ..pruning import plan
from ..pruning.hook import KeepMasks
from ..train import find_recipe, list_recipes, load_net, load_recipe, train
from ..train.mnist5k import load_digits
from ._timing import common_parser, describe_machine, parse_and_set_threads, write_report

MODULE = "foveate.benchmarks.pruning_mnist5k"

RECIPES = ("nat_micro_1xb64_mnist5k", "swin_micro_1xb64_mnist5k", "van_micro_1xb64_mnist5k")
METHODS = {  # name in the table -> method, and what is ranked together
    "dimap": ("dimap", "group"),
    "lamp": ("lamp", "model"),
    "magnitude": ("magnitude", "model"),
    "group magnitude": ("magnitude", "group"),
    "uniform magnitude": ("magnitude", "layer"),
    "random": ("random", "model"),
}
RATIOS = (0.5, 0.7, 0.8, 0.9)
TUNED_RATIO = 0.5
MEAN, STD = 0.1307, 0.3081


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    """Return the top-1 accuracy, in %."""
    return 100 * float((model.eval()(images).argmax(1) == targets).float().mean())


def held_out() -> tuple[Tensor, Tensor]:
    digits, targets = load_digits("validation")
    return (digits[:, None].float() / 255 - MEAN) / STD, targets


def zeroed(model: nn.Module, name: str, ratio: float, *, seed: int, px: int) -> nn.Module:
    """Return a copy of the model with a share of its weights zeroed by one of METHODS."""
    method, scope = METHODS[name]
    return plan(model, method, ratio, scope=scope, img_size=px, seed=seed).apply(deepcopy(model))


def measure(recipe: str, seed: int, folder: Path, epochs: int | None = None) -> dict[str, float]:
    """Train, prune and (if there is a recipe) fine-tune one model; return top-1 in %, per method."""
    images, targets = held_out()
    options = {"seed": seed} | ({} if epochs is None else {"schedule.epochs": epochs})
    trained = train(recipe, work_dir=folder / "dense", resume=True, cfg_options=options)
    dense = load_net(trained.last_checkpoint)
    found = {"dense": top1(dense, images, targets)}
    for ratio in RATIOS:
        for name in METHODS:
            model = zeroed(dense, name, ratio, seed=seed, px=images.shape[-1])
            found[f"{name} {ratio:.0%}"] = top1(model, images, targets)
    return found | (_tune(recipe, seed, dense, folder) if f"{recipe}-dimap" in list_recipes() else {})


def _tune(recipe: str, seed: int, dense: nn.Module, folder: Path) -> dict[str, float]:
    images, targets = held_out()
    px = images.shape[-1]
    chosen = plan(dense, "dimap", TUNED_RATIO, img_size=px)
    masked = _saved(chosen.apply(deepcopy(dense)), folder / "zeroed")
    hooks = [{"type": KeepMasks.__name__, "plan": str(chosen.save(folder / "plan.json"))}]
    found = {"dimap 50% tuned": _tuned(recipe, seed, masked, folder, {"hooks": hooks}, images, targets)}
    smaller = plan(dense, "dimap", TUNED_RATIO, structure=("heads", "mlp"), img_size=px).cut(dense)
    found["heads+mlp 50%"] = top1(smaller, images, targets)
    cut = _saved(smaller, folder / "cut")
    widths = {"model.widths": str(cut / "config.json"), "hooks": []}
    found["heads+mlp 50% tuned"] = _tuned(recipe, seed, cut, folder, widths, images, targets)
    return found


def _saved(model: nn.Module, folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder if folder.exists() else save_hub(model, folder)


def _tuned(recipe: str, seed: int, hub: Path, folder: Path, options: dict, images: Tensor, targets: Tensor) -> float:
    options = {"seed": seed, "model.checkpoint": str(hub / "model.safetensors"), **options}
    tuning = load_recipe(find_recipe(f"{recipe}-dimap"), options)
    done = train(tuning, work_dir=folder / f"tuned-{hub.name}", resume=True)
    return top1(load_net(done.last_checkpoint), images, targets)


def tabulate(recipe: str, seeds: list[int], runs: list[dict[str, float]], epochs: int | None = None) -> Table:
    trained = "" if epochs is None else f", {epochs} epochs"
    table = Table(title=f"{recipe}{trained}: top-1 on 1000 held-out digits, %")
    table.add_column("model", no_wrap=True)
    for name in (*(f"seed {seed}" for seed in seeds), "mean"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in runs[0]:
        values = [run[name] for run in runs]
        table.add_row(name, *(f"{value:.1f}" for value in (*values, statistics.mean(values))))
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = common_parser(MODULE, __doc__, rounds=None)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES, metavar="NAME", help="(default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--epochs", type=int, help="epochs of training (default: the recipe's)")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="keep the runs in DIR, and resume them")
    options = parse_and_set_threads(parser, arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work_dir or Path(temporary)
        tables = []
        for name in options.recipes:
            runs = [measure(name, seed, folder / name / str(seed), options.epochs) for seed in options.seeds]
            tables.append(tabulate(name, options.seeds, runs, options.epochs))
    write_report(Group(*tables), module=MODULE, machine=describe_machine(), out=options.out)


if __name__ == "__main__":
    main()
