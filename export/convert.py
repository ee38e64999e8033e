"""Write a model's weights to one file, and compare a model with weights, exported files or recorded outputs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .._errors import first_line
from .._files import UnreadableFileError, check_regular
from .._modes import evaluating
from .._timm import pretrained_cfg
from .agreement import TOLERANCE, compare_outputs, verify
from .errors import DisagreementError, ExportError
from .files import check_target
from .inputs import real_images
from .runtimes import as_list, is_exported_file
from .weights import write_weights


def save_weights(model: nn.Module, out: str | Path) -> Path:
    """Write the model's state dict, as timm loads it, to a .safetensors or .pth file.

    The file is written atomically: on error an existing file is left unchanged.

    Raises:
        ExportError: another suffix, or no such folder.
        OSError: the disk is full.
    """
    out = Path(out)
    check_target(out, ".pth" if out.suffix == ".pth" else ".safetensors")
    write_weights(model.state_dict(), out, pretrained_cfg(model).get("architecture", ""))
    return out


def compare_files(model: nn.Module, other: Path, load: Callable[[Path], nn.Module]) -> str:
    """Compare a model with a file, and return the result for a report.

    Args:
        other: weights (all tensors must be equal), an exported file or hub folder (logits on real images), or .npz with
            the arrays images (B, C, H, W), preprocessed, and logits (B, classes), recorded from the official code.
        load: returns the same model with the weights of a file.

    Raises:
        DisagreementError: the outputs or the tensors differ.
        ExportError: the file cannot be read.
    """
    if other.suffix == ".npz":
        return _compare_recorded(model, other)
    if is_exported_file(str(other)):
        agreement = verify(model, other, real_images(model))
        return f"{other}: logits within {agreement.largest_relative:.2g} std on {agreement.images} images"
    theirs = load(other).state_dict()
    ours = model.state_dict()
    different = [key for key, value in ours.items() if not torch.equal(value, theirs[key])]
    if different:
        raise DisagreementError(f"{len(different)} of {len(ours)} tensors differ from {other}, first {different[0]}")
    return f"{other}: all {len(ours)} tensors are equal"


def _compare_recorded(model: nn.Module, path: Path) -> str:
    images, wanted = _recorded(path)
    with evaluating(model), torch.no_grad():
        try:
            got = as_list(model(images))[0]
        except Exception as error:  # models raise many types
            raise ExportError(
                f"the model does not run on the images {tuple(images.shape)}: {first_line(error)}"
            ) from error
    agreement = compare_outputs([wanted], [got], (len(images),))
    if not agreement.largest_relative <= TOLERANCE:
        raise DisagreementError(
            f"{path.name}: the model's logits differ by {agreement.largest_relative:.2g} standard deviations; "
            f"{TOLERANCE:.2g} is allowed"
        )
    return f"{path}: logits within {agreement.largest_relative:.2g} std on {len(images)} images"


def _recorded(path: Path) -> tuple[Tensor, Tensor]:
    try:
        check_regular(path)
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["images"]).float(), torch.from_numpy(arrays["logits"]).float()
    except UnreadableFileError as error:
        raise ExportError(f"{path} {error}") from error
    except Exception as error:  # numpy and zipfile raise many types
        raise ExportError(f"{path}: wanted the arrays images and logits: {first_line(error)}") from error
