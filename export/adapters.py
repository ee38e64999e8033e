"""Low-rank adapters (LoRA) through peft: insert them into a model, save, load and merge them."""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._errors import first_line
from .._files import UnreadableFileError, atomic_path, read_json
from .._timm import pretrained_cfg
from .._torch_files import read_weights
from .errors import ExportError
from .files import require_packages
from .weights import write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME, _PREFIX = "default", "base_model.model."  # peft's name of the only adapter; what its names of tensors begin with
_LARGEST_BYTES = 2**24
_SUPPORTED = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "bias", "fan_in_fan_out"),
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform"),
)
_NO_EFFECT = (  # on what a loaded adapter computes
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "inference_mode",
        "revision",
        "base_model_name_or_path",
        "auto_mapping",
    ),
    *("init_lora_weights", "megatron_core"),
)
_DEFAULTS = {"qalora_group_size": (16,)}


def add_lora(
    model: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str], trained: Sequence[str]
) -> None:
    """Insert adapters in place: y = W x + alpha / rank * B A x. Only the adapters and `trained` keep gradients.

    Args:
        model: a timm model; its layers get the attributes of peft's.
        rank: rows of A.
        alpha: scale of the adapter is alpha / rank.
        dropout: of x, in training.
        targets: shell patterns of names of nn.Linear and nn.Conv2d without groups.
        trained: names of modules that train whole, such as the classifier; saved with the adapter.

    Raises:
        ExportError: a pattern matches no such layer.
        MissingExtraError: peft is not installed.
    """
    require_packages("lora", "peft")
    from peft import LoraConfig, get_peft_model

    names = match_layers(model, targets, trained)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number
        lora_dropout=dropout,
        target_modules=names,
        modules_to_save=list(trained) or None,
    )
    get_peft_model(model, config)


def match_layers(model: nn.Module, targets: Sequence[str], trained: Sequence[str]) -> list[str]:
    """Return the names of the layers that the patterns match, without those that train whole."""
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and _is_plain(module))
        if not any(name == other or name.startswith(f"{other}.") for other in trained)
    ]
    for pattern in targets:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ExportError(f"{pattern!r} matches no linear layer and no convolution without groups and dilation")
    return [name for name in layers if any(fnmatchcase(name, pattern) for pattern in targets)]


def has_lora(model: nn.Module) -> bool:
    """Say whether `add_lora` inserted adapters that are not merged."""
    return any(name.endswith(f".lora_A.{_NAME}") for name, _ in model.named_modules())


def save_adapter(model: nn.Module, folder: str | Path, weights: dict[str, Tensor] | None = None) -> Path:
    """Write the adapters of a model, and the modules that train whole, as peft's two files.

    Args:
        model: with adapters of `add_lora`.
        folder: created if missing; each file is written atomically.
        weights: a state dict of the model to take the adapters from, such as averages; None: the model's own.

    Raises:
        ExportError: the model has no adapters.
        OSError: the disk is full.
    """
    from peft import get_peft_model_state_dict

    if not has_lora(model):
        raise ExportError(f"{type(model).__name__} has no adapters")
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    adapters = get_peft_model_state_dict(model, state_dict=weights)
    config = model.peft_config[_NAME].to_dict()  # type: ignore[index, union-attr]  # nn.Module's attributes are untyped
    config |= {"inference_mode": True, "target_modules": sorted(config["target_modules"])}
    with atomic_path(folder / WEIGHTS) as part:
        write_safetensors({f"{_PREFIX}{key}": t.detach().cpu().contiguous() for key, t in adapters.items()}, part)
    with atomic_path(folder / CONFIG) as part:
        part.write_text(json.dumps(config, indent=2, default=str) + "\n")
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Insert the LoRA adapters of a folder into a model, strictly. Runs no code from the files.

    The classifier gets as many classes as the adapter's, if the adapter has one.

    Raises:
        ExportError: no adapter of LoRA, one with options that are not supported, or one of another model.
        MissingExtraError: peft is not installed.
    """
    require_packages("lora", "peft")
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    folder = Path(folder)
    given = _read_config(folder)
    found = _read_tensors(folder / WEIGHTS)
    try:
        _fit_classes(model, found)
        adapted = get_peft_model(model, LoraConfig(**given))
        wanted = {f"{_PREFIX}{key}": value.shape for key, value in get_peft_model_state_dict(model).items()}
        if wrong := sorted(wanted.keys() ^ found.keys()):
            raise ValueError(f"tensors of the adapter and of the model differ, first {wrong[0]}")
        if wrong := [key for key, shape in wanted.items() if found[key].shape != shape]:
            raise ValueError(f"{wrong[0]} has shape {tuple(found[wrong[0]].shape)}, wanted {tuple(wanted[wrong[0]])}")
        set_peft_model_state_dict(adapted, found)
    except Exception as error:  # peft raises many types
        raise ExportError(f"adapter {folder} does not fit {type(model).__name__}: {first_line(error)}") from error


def _is_plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.dilation == (1, 1)  # peft's adapters of convolutions do not dilate


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return read_weights(path)
    except UnreadableFileError as error:
        raise ExportError(f"adapter {path} {error}") from error


def _fit_classes(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the model as many classes as the classifier has that the adapter holds."""
    name = pretrained_cfg(model).get("classifier")
    bias = weights.get(f"{_PREFIX}{name}.bias")
    if bias is not None and len(bias) != model.num_classes:
        model.reset_classifier(len(bias))  # type: ignore[operator]  # nn.Module's attributes are untyped
        pretrained_cfg(model)["num_classes"] = len(bias)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG, _LARGEST_BYTES)
    except UnreadableFileError as error:
        raise ExportError(f"adapter {folder / CONFIG} {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ExportError(f"adapter {folder}: wanted an adapter of LoRA (peft_type LORA)")
    other = {key: value for key, value in config.items() if key not in (*_SUPPORTED, *_NO_EFFECT)}
    if used := sorted(
        key for key, value in other.items() if value not in (None, False, {}, [], *_DEFAULTS.get(key, ()))
    ):
        raise ExportError(f"adapter {folder}: its option {used[0]} is not supported")
    return {key: config[key] for key in _SUPPORTED if config.get(key) is not None}


def merge_lora(model: nn.Module) -> nn.Module:
    """Merge the adapters into the weights, in place: the model has its plain layers again. Return the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[_NAME])
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(True)
