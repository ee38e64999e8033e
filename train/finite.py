"""Find where a loss or a gradient stopped to be finite: in which layer, and with which files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import all_gather_object
from torch import Tensor, nn

from .images import Batch
from .together import unwrapped

_NAMES_SHOWN = 4


def explain(model: nn.Module, batches: Sequence[tuple[int, Batch]], reseed: Callable[[int], None], name: Any) -> str:
    """Run the batches of a step again, and return "first in LAYER; files A, B" of the first process that finds it.

    Args:
        model: with the weights and the gradients of the failed step.
        batches: (number in the epoch, batch) of the step.
        reseed: restores the random numbers of a batch, given its number.
        name: from an index of the data set to a file's name.
    """
    classifier = unwrapped(model)
    found = ""
    for number, batch in batches:
        reseed(number)
        with _watching(classifier.net) as layers, torch.no_grad(), torch.compiler.set_stance("force_eager"):
            images, targets = classifier.data_preprocessor(batch, True)
            logits = classifier.logits(images)
            loss = classifier(images, targets, "loss")["loss"]
        if not found and not (layers == [] and bool(torch.isfinite(loss))):
            rows = (~torch.isfinite(logits).all(1)).nonzero().flatten().tolist()
            where = layers[0] if layers else _weights(classifier.net) or "the loss"
            found = f"first in {where}; files {_files(batch, rows, name)}"
    if not found and (gradient := _gradient(classifier.net)):
        batch = batches[-1][1]
        found = f"first in the gradient of {gradient}; files {_files(batch, [], name)}"
    return next((text for text in all_gather_object(found) if text), "not found again in a second pass")


@contextmanager
def _watching(net: nn.Module) -> Iterator[list[str]]:
    """Yield a list that gets the names of the modules whose output is not finite, in the order of computation."""
    names: list[str] = []
    bad = _weights(net)

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not all(map(_is_finite, output if isinstance(output, list | tuple) else [output])):
                names.append(f"{name} (its weights are not finite)" if bad.startswith(f"{name}.") else name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in net.named_modules() if name]
    try:
        yield names
    finally:
        for handle in hooks:
            handle.remove()


def _is_finite(output: Any) -> bool:
    return not isinstance(output, Tensor) or not output.is_floating_point() or bool(torch.isfinite(output).all())


def _weights(net: nn.Module) -> str:
    """Return the name of the first parameter that is not finite."""
    return next((name for name, p in net.named_parameters() if not bool(torch.isfinite(p).all())), "")


def _gradient(net: nn.Module) -> str:
    """Return the name of the last parameter whose gradient is not finite: the first that the backward pass reached."""
    bad = [n for n, p in net.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    return bad[-1] if bad else ""


def _files(batch: Batch, rows: list[int], name: Any) -> str:
    rows = [row for row in rows or range(len(batch.indices)) if row < len(batch.indices)]
    shown = [name(batch.indices[row]) for row in rows[:_NAMES_SHOWN]]
    return ", ".join(shown) + (f" and {len(rows) - _NAMES_SHOWN} more" if len(rows) > _NAMES_SHOWN else "")
