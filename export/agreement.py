"""Run an exported model and the PyTorch model on images; refuse a difference larger than float32 rounding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .._errors import first_line
from .._modes import evaluating
from .errors import DisagreementError, ExportError
from .runtimes import as_list, open_file

# Another order of float32 sums changes logits by 1e-6 to 2e-5 of their standard deviation. A wrong eps, activation or
# scale changes them by 1e-3 and more.
TOLERANCE = 1e-4
BATCH_SIZES = (1, 3)  # two sizes detect a graph with a fixed batch; exporters specialize on 1


@dataclass(frozen=True)
class Agreement:
    """How closely an exported model follows the PyTorch model."""

    largest_absolute: float  # largest |difference| of any output
    largest_relative: float  # the same, in standard deviations of that output
    top1: float | None  # share of images with the same top class; None if the output is not (B, classes)
    images: int
    batch_sizes: tuple[int, ...]
    tolerance: float  # of largest_relative


def verify(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    tolerance: float = TOLERANCE,
) -> Agreement:
    """Compare the exported file with the model for each batch size.

    A .pt2 file can run code: pass only programs that you trust. ONNX files, OpenVINO IR and hub folders run no code.

    Args:
        model: the PyTorch model that was exported; runs in eval mode on the CPU.
        path: a file that `open_file` opens, or a folder in timm's hub layout.
        images: (N, C, H, W), preprocessed, N >= sum(batch_sizes).
        batch_sizes: the images are split into batches of these sizes.
        tolerance: largest difference allowed, in standard deviations of the model's own output.

    Raises:
        DisagreementError: a larger difference, another shape, or NaN.
        ExportError: no comparison is possible: too few images, or a constant output.
    """
    if len(images) < sum(batch_sizes):
        raise ExportError(f"batches of {tuple(batch_sizes)} need {sum(batch_sizes)} images, got {len(images)}")
    batches = images[: sum(batch_sizes)].split(list(batch_sizes))
    run = open_file(path := Path(path)).run
    with evaluating(model), torch.no_grad():
        wanted = [_run_model(model, batch) for batch in batches]
        got = [_run_batch(run, batch, path) for batch in batches]
    agreement = compare_outputs(_join(wanted), _join(got), tuple(batch_sizes), tolerance)
    if not agreement.largest_relative <= tolerance:  # written so that a NaN fails
        raise DisagreementError(
            f"{path.name} differs from the model by {agreement.largest_relative:.2g} standard deviations of its output "
            f"(absolute {agreement.largest_absolute:.2g}); {tolerance:.2g} is allowed"
        )
    return agreement


def _run_model(model: nn.Module, batch: Tensor) -> list[Tensor]:
    try:
        return as_list(model(batch))
    except Exception as error:  # models raise many types
        raise ExportError(f"the model does not run on a batch of {tuple(batch.shape)}: {first_line(error)}") from error


def _run_batch(run: Callable[[Tensor], list[Tensor]], batch: Tensor, path: Path) -> list[Tensor]:
    try:
        return run(batch)
    except Exception as error:  # runtimes raise many types
        raise DisagreementError(
            f"{path.name} does not run on a batch of {tuple(batch.shape)}: {first_line(error)}"
        ) from error


def _join(batches: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def compare_outputs(
    wanted: list[Tensor], got: list[Tensor], batch_sizes: tuple[int, ...], tolerance: float = TOLERANCE
) -> Agreement:
    """Return how closely outputs follow those of the model, whatever the tolerance.

    Raises:
        DisagreementError: another number or shape of outputs.
        ExportError: an output of the model is constant or NaN.
    """
    want_shapes, got_shapes = ([tuple(t.shape) for t in outputs] for outputs in (wanted, got))
    if want_shapes != got_shapes:
        raise DisagreementError(f"the exported model returns {got_shapes}, the model {want_shapes}")
    spreads = [want.std().item() for want in wanted]
    if not all(spread > 0 for spread in spreads):
        raise ExportError("the model's output is constant or NaN, so that no comparison is possible")
    absolute = torch.stack([(w - g).abs().max() for w, g in zip(wanted, got, strict=True)])
    relative = absolute / torch.tensor(spreads)
    largest = absolute.max().item(), relative.max().item()  # torch's max, unlike Python's, keeps NaN
    return Agreement(*largest, _top1(wanted, got), len(wanted[0]), batch_sizes, tolerance)


def _top1(wanted: list[Tensor], got: list[Tensor]) -> float | None:
    if len(wanted) > 1 or wanted[0].ndim != 2:
        return None
    return (wanted[0].argmax(1) == got[0].argmax(1)).float().mean().item()
