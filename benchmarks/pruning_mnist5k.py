"""What pruning costs in accuracy, on real digits: one-shot by several criteria, and after fine-tuning.

    python -m foveate.benchmarks.pruning_mnist5k --seeds 0 1 2 --out results.txt

Net        The micro NAT of the recipe nat_micro_1xb64_mnist5k, trained from scratch for each seed; last epoch.
One-shot   Top-1 on the 1000 held-out digits right after a share of the weights of QKV, PRJ and MLP was zeroed. Every
           method zeroes the same share of each net: DIMAP in each module group, uniform magnitude in each layer, the
           others over all groups at once.
Tuned      After fine-tuning for a third of the epochs with the zeros held (recipe nat_micro_1xb64_mnist5k-dimap), and
           of the net whose heads and hidden channels were cut in half by the summed DIMAP score (nothing to hold).
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from ..export import save_hub
from ..pruning import plan
from ..train import find_recipe, load_net, load_recipe, train
from ..train.mnist5k import load_digits
from ._timing import describe_machine, write_report

RECIPE = "nat_micro_1xb64_mnist5k"
TUNING = f"{RECIPE}-dimap"
METHODS = {  # name in the table -> method, and what is ranked together
    "dimap": ("dimap", "group"),
    "lamp": ("lamp", "model"),
    "magnitude": ("magnitude", "model"),
    "uniform magnitude": ("magnitude", "layer"),
    "random": ("random", "model"),
}
RATIOS = (0.5, 0.7, 0.8, 0.9)
TUNED_RATIO = 0.5
MEAN, STD = 0.1307, 0.3081


@torch.inference_mode()
def top1(net: nn.Module, images: Tensor, targets: Tensor) -> float:
    """Percent of the images whose class the net names."""
    return 100 * float((net.eval()(images).argmax(1) == targets).float().mean())


def held_out() -> tuple[Tensor, Tensor]:
    digits, targets = load_digits("validation")
    return (digits[:, None].float() / 255 - MEAN) / STD, targets


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Train, prune and tune one net; return top-1 in percent, by what was done."""
    images, targets = held_out()
    dense = train(RECIPE, work_dir=folder / "dense", resume=True, cfg_options={"seed": seed}).last_checkpoint
    found = {"dense": top1(load_net(dense), images, targets)}
    px = images.shape[-1]
    for ratio in RATIOS:
        for name, (method, scope) in METHODS.items():
            net = load_net(dense)
            plan(net, method, ratio, scope=scope, img_size=px, seed=seed).apply(net)
            found[f"{name} {ratio:.0%}"] = top1(net, images, targets)
    chosen = plan(load_net(dense), "dimap", TUNED_RATIO, img_size=px)
    zeroed = _saved(chosen.apply(load_net(dense)), folder / "zeroed")
    hooks = [{"type": "foveate.pruning.hook.KeepMasks", "plan": str(chosen.save(folder / "plan.json"))}]
    found["dimap 50% tuned"] = _tuned(seed, zeroed, folder, {"hooks": hooks}, images, targets)
    smaller = plan(load_net(dense), "dimap", TUNED_RATIO, structure=("heads", "mlp"), img_size=px).cut(load_net(dense))
    found["heads+mlp 50%"] = top1(smaller, images, targets)
    cut, widths = _saved(smaller, folder / "cut"), {"model.widths": smaller.widths, "hooks": []}
    found["heads+mlp 50% tuned"] = _tuned(seed, cut, folder, widths, images, targets)
    return found


def _saved(net: nn.Module, folder: Path) -> Path:
    return folder if folder.exists() else save_hub(net, folder)


def _tuned(seed: int, hub: Path, folder: Path, options: dict, images: Tensor, targets: Tensor) -> float:
    options = {"seed": seed, "model.checkpoint": str(hub / "model.safetensors"), **options}
    done = train(load_recipe(find_recipe(TUNING), options), work_dir=folder / f"tuned-{hub.name}", resume=True)
    return top1(load_net(done.last_checkpoint), images, targets)


def tabulate(seeds: list[int], runs: list[dict[str, float]]) -> Table:
    table = Table(title=f"{RECIPE}: top-1 on 1000 held-out digits, %")
    table.add_column("net", no_wrap=True)
    for name in (*(f"seed {seed}" for seed in seeds), "mean"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in runs[0]:
        values = [run[name] for run in runs]
        table.add_row(name, *(f"{value:.1f}" for value in (*values, statistics.mean(values))))
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m foveate.benchmarks.pruning_mnist5k", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="keep the runs there, and go on with them")
    parser.add_argument("--threads", type=int, help="CPU threads (default torch's own)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table with command and machine here too")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work_dir or Path(temporary)
        runs = [measure(seed, folder / str(seed)) for seed in options.seeds]
    table = tabulate(options.seeds, runs)
    write_report(table, module="foveate.benchmarks.pruning_mnist5k", machine=describe_machine(), out=options.out)


if __name__ == "__main__":
    main()
