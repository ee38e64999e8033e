"""What a run is, in a few lines before it starts: model, weights, data, device, batch, rate, iterations and time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader

from .._errors import first_line
from .._modes import evaluating, keeping_modes
from ..attention_ops.macs import count_macs
from .errors import TrainError
from .model import Classifier, input_size
from .recipe import Recipe

_TRIAL_IMAGES = 4  # of the trial step on a CPU; a whole batch elsewhere
_FORWARD_SHARE = 1 / 3  # of a training step
_UNITS = (("day", 86400), ("h", 3600), ("min", 60), ("s", 1))


@dataclass(frozen=True)
class Run:
    """Everything that a run is built from."""

    recipe: Recipe
    model: Classifier
    train_loader: DataLoader
    val_loader: DataLoader
    processes: int
    device: torch.device
    notes: Sequence[str]  # on the weights that the model starts from
    done_epochs: int = 0  # of a resumed run

    @property
    def global_batch(self) -> int:
        return self.recipe.batch_size * self.recipe.accumulate * self.processes


def scale_rate(recipe: Recipe, processes: int) -> Recipe:
    """Return the recipe with its rates multiplied by the run's global batch over the recipe's.

    The learning rate, the rate at the start of the warm-up and the minimum are scaled (the linear rule).

    Raises:
        TrainError: the recipe does not say for which global batch its rate is.
    """
    batch = recipe.batch_size * recipe.accumulate * processes
    if recipe.global_batch is None:
        raise TrainError("--scale-lr: the recipe does not say for which batch its rate is; set global_batch")
    factor, schedule = batch / recipe.global_batch, recipe.schedule
    warmup_lr = None if schedule.warmup_lr is None else schedule.warmup_lr * factor
    return replace(
        recipe,
        global_batch=batch,
        optimizer=replace(recipe.optimizer, lr=recipe.optimizer.lr * factor),
        schedule=replace(schedule, warmup_lr=warmup_lr, min_lr=schedule.min_lr * factor),
    )


def describe_run(run: Run) -> list[str]:
    """Return the lines; computes one training step of a few zero images, which changes nothing.

    Raises:
        TrainError: a batch does not fit into the device's memory.
    """
    recipe = run.recipe
    seconds = _image_seconds(run)
    lines = [
        f"model    {_describe_model(run)}",
        *_indented("weights", run.notes or ["random"]),
        f"data     {_describe_data(run)}",
        f"device   {run.device}, {_count(run.processes, 'process', 'processes')}, {recipe.precision}",
        f"batch    {run.global_batch} = {recipe.batch_size} images x {recipe.accumulate} accumulated x {run.processes}",
        f"rate     {_describe_rate(recipe)}",
        f"run      {_describe_length(run, seconds)}",
    ]
    if recipe.global_batch not in (None, run.global_batch):
        factor = run.global_batch / recipe.global_batch
        lines.append(
            f"warning: the rate {recipe.optimizer.lr:g} is for a global batch of {recipe.global_batch}, this run has "
            f"{run.global_batch}; --scale-lr multiplies the rate by {factor:g}"
        )
    return lines


def duration(seconds: float) -> str:
    """Return a length of time in its two largest units, such as 2 days 3 h."""
    left, parts = max(1, round(seconds)), []
    for name, size in _UNITS:
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {name}{'s' if name == 'day' and count > 1 else ''}")
        elif parts:
            break
        if len(parts) == 2:
            break
    return " ".join(parts)


def _describe_model(run: Run) -> str:
    net, size = run.model.net, input_size(run.recipe)
    every = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    share = "" if trained == every else f", {trained / 1e6:.2f} M of them trained"
    with evaluating(net):
        macs = count_macs(net, torch.zeros(1, *size, device=run.device))
    pixels = "x".join(map(str, size))
    return f"{run.recipe.model.name}: {every / 1e6:.2f} M parameters{share}, {macs / 1e9:.3g} GMACs at {pixels}"


def _describe_data(run: Run) -> str:
    data = run.recipe.data
    images = [f"{len(loader.dataset):,}" for loader in (run.train_loader, run.val_loader)]  # type: ignore[arg-type]
    return (
        f"{data.root or data.source}: {images[0]} images for training, {images[1]} for validation, "
        f"{run.recipe.model.num_classes} classes"
    )


def _describe_rate(recipe: Recipe) -> str:
    optimizer, schedule = recipe.optimizer, recipe.schedule
    shape = "constant" if schedule.kind == "constant" else f"{schedule.kind} to {schedule.min_lr:g}"
    warmup = f" after {schedule.warmup_epochs:g} epochs of warm-up" if schedule.warmup_epochs else ""
    return f"{optimizer.lr:g}, {shape}{warmup}; {optimizer.opt}, weight decay {optimizer.weight_decay:g}"


def _describe_length(run: Run, seconds: float) -> str:
    """Say how many iterations are left, and estimate their time from that of one image."""
    epochs = run.recipe.schedule.total_epochs - run.done_epochs
    batches = len(run.train_loader)
    images = batches * run.recipe.batch_size + _FORWARD_SHARE * len(run.val_loader) * run.recipe.batch_size
    left = f" from epoch {run.done_epochs + 1} on" if run.done_epochs else ""
    return (
        f"{batches * epochs:,} iterations in {_count(epochs, 'epoch')}{left}, {batches:,} each; about "
        f"{duration(epochs * images * seconds)} of computation"
    )


def _image_seconds(run: Run) -> float:
    """Return the time of a training step per image: forward and backward, of zeros, without the optimizer."""
    on_cpu = run.device.type == "cpu"
    count = min(run.recipe.batch_size, _TRIAL_IMAGES) if on_cpu else run.recipe.batch_size
    images = torch.zeros(count, *input_size(run.recipe), device=run.device)
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    times = []
    try:
        with keeping_modes(run.model), torch.random.fork_rng():
            run.model.train()
            for _ in range(1 if on_cpu else 2):  # the first step on a GPU chooses kernels
                times.append(_time_step(run.model, images))
    except torch.OutOfMemoryError as error:
        raise TrainError(f"batch_size: {count} images do not fit into {run.device}: {first_line(error)}") from error
    finally:
        run.model.zero_grad(set_to_none=True)
        for name, buffer in run.model.named_buffers():
            buffer.copy_(buffers[name])
    return times[-1] / count


def _time_step(model: Classifier, images: torch.Tensor) -> float:
    start = time.perf_counter()
    model.trial(images).backward()
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start


def _indented(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title if i == 0 else '':<9}{line}" for i, line in enumerate(lines)]


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
