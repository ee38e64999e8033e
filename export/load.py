"""Create a model from a name and a checkpoint, or explain in one line why this fails."""

import os
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs, is_model, parse_model_name, split_model_name_tag
from torch import nn

from .._errors import did_you_mean, first_line
from .._model_args import FEATURE_ARGS, check_model_args
from .._timm import pretrained_cfg
from .._weights import prefers_averages
from .adapters import load_adapter, merge_lora
from .errors import ExportError
from .hub_files import CONFIG, check_hub_config, read_hub_weights
from .inputs import without_warnings
from .weights import explain_mismatch, read_model_weights

_NO_OTHER_SOURCE = {
    **{"source": None, "url": None, "file": None, "hf_hub_id": None, "hf_hub_filename": None},
    "custom_load": False,
}


def load_model(
    name: str,
    checkpoint: str | Path | None = None,
    *,
    pretrained: bool = False,
    adapter: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a model in eval mode, with all of its weights from one source. Runs no code from any file.

    A checkpoint gives tensors. A hub folder's config.json gives a registered architecture and its arguments. Other
    files that they name are not read. `hf-hub:` downloads through timm, which reads safetensors, or torch files with
    `weights_only=True`. No other name downloads anything, unless `pretrained` is set.

    Args:
        name: a timm model name (`van_b0`, `van_b0.in1k`); `local-dir:FOLDER` and `hf-hub:ORG/REPO` hold weights.
        checkpoint: .pth or .safetensors in the official layout or ours; passed to the family's checkpoint filter. It is
            loaded strictly: no tensor may be missing or left over.
        pretrained: load the published weights that timm knows for the name.
        adapter: folder of a LoRA adapter for these weights, as peft writes it; it is merged into them.
        kwargs: the model's own arguments, such as num_classes.

    Raises:
        ExportError: unknown model, unknown argument, or weights of another model.
    """
    source, model_id = _check_name(name)
    _check_factory_arguments(kwargs)
    if checkpoint is not None and pretrained:
        raise ExportError(f"weights for {name} from the checkpoint {checkpoint} or pretrained, not both")
    if adapter is not None and not pretrained and source is None and checkpoint is None:
        raise ExportError(f"the adapter {adapter} changes given weights: name a checkpoint of {name}, or pretrained")
    wants_weights = pretrained or source is not None or checkpoint is not None
    if checkpoint is not None:
        overlay, origin = _overlay(name, checkpoint, kwargs), f"checkpoint {checkpoint}"
    elif source == "local-dir":
        weights = read_hub_weights(Path(model_id), use_ema=prefers_averages(name))
        overlay, origin = {**_NO_OTHER_SOURCE, "state_dict": weights}, f"folder {model_id}"
    else:
        overlay, origin = None, "the published weights"
    try:
        with without_warnings():
            model = timm.create_model(name, pretrained=wants_weights, pretrained_cfg_overlay=overlay, **kwargs)
    except Exception as error:  # checkpoint filters raise many types
        _check_arguments(name, kwargs)
        raise ExportError(f"{origin} cannot be loaded into {name}: {explain_mismatch(error)}") from error
    pretrained_cfg(model).pop("state_dict", None)  # the model holds the tensors now
    if adapter is not None:
        load_adapter(model, adapter)
        merge_lora(model)
    return model.eval()


def _overlay(name: str, checkpoint: str | Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("features_only"):  # timm does not load these strictly: load the whole model first
        whole = load_model(name, checkpoint, **{k: v for k, v in kwargs.items() if k not in FEATURE_ARGS})
        return {**_NO_OTHER_SOURCE, "state_dict": whole.state_dict()}
    overlay = {**_NO_OTHER_SOURCE, "state_dict": read_model_weights(checkpoint, use_ema=prefers_averages(name))}
    if "num_classes" in kwargs:  # otherwise timm skips the classifier of the file
        overlay |= {"num_classes": kwargs["num_classes"], "label_offset": None}
    return overlay


def _check_name(name: str) -> tuple[str | None, str]:
    """Return the prefix of a name (`local-dir`, `hf-hub`; None: a registered model), and the rest."""
    try:
        source, model_id = parse_model_name(name)
    except ValueError as error:
        raise ExportError(first_line(error)) from error
    if source == "local-dir":
        if not os.path.exists(Path(model_id, CONFIG)):  # unlike Path.exists, False for any name
            raise ExportError(f"{name}: {model_id} holds no config.json, wanted a folder in timm's hub layout")
        check_hub_config(Path(model_id))
    if source is None:
        _check_registered(name)
    return source, model_id


def _check_factory_arguments(kwargs: dict[str, Any]) -> None:
    try:
        check_model_args(kwargs, "model arguments")
    except ValueError as error:
        raise ExportError(str(error)) from error


def _check_registered(name: str) -> None:
    arch, tag = split_model_name_tag(name)
    if not is_model(arch):
        near = did_you_mean(arch, timm.list_models()) or "; see timm.list_models()"
        raise ExportError(f"unknown model {arch}{near}")
    known = [split_model_name_tag(entry)[1] for entry in get_arch_pretrained_cfgs(arch)]
    if tag and tag not in known:
        raise ExportError(f"unknown weights {tag} of {arch}; known: {', '.join(known) or 'none'}")


def _check_arguments(name: str, kwargs: dict[str, Any]) -> None:
    try:
        with without_warnings():
            timm.create_model(name, **kwargs)
    except Exception as error:
        raise ExportError(f"{name} cannot be built with {kwargs}: {first_line(error)}") from error
