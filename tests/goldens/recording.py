"""What of a model of other code a golden holds: its outputs and gradients under weights and inputs drawn by det.py."""

import importlib.util
import inspect
import platform
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate._errors import did_you_mean, first_line

DENSE = 1024  # samples of a map that a model returns; 64 of a stage, 4 of a gradient

# by path: other code may have a module `det`
_spec = importlib.util.spec_from_file_location("_det", Path(__file__).with_name("det.py"))
det = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(det)


class RecordError(ValueError):
    """A golden that cannot be recorded; the message says why in one line."""


class Gradients(str, Enum):
    """What is stored of a parameter's gradient beside its norm."""

    DOT = "dot"
    SAMPLES = "samples"


@dataclass(frozen=True)
class Request:
    """What to record.

    Attributes:
        make: MODULE:FUNCTION, which returns the model when called with `args`.
        sizes: (height, width) in pixels; the first is recorded with two images, the others with one.
        rename: (pattern, replacement) of `re.sub`, applied in order to the model's keys; weights are drawn by the
            result.
        computed: endings of keys of buffers that the model computes itself; they are not drawn, and not in the golden.
        mul: factor of the drawn weights, by ending of the key; gain: factor of all weights of two or more dimensions.
        grad_gain: gain for the gradients, if another one.
        stages: (index, name of a module): its output is the map of our model's stage `index`. Without any, the maps of
            the model's own `forward_intermediates` are recorded, if it has that.
        channels_last: these modules return (B, H, W, C).
    """

    variant: str
    make: str
    args: dict[str, Any]
    sizes: tuple[tuple[int, int], ...] = ((224, 224),)
    path: Path | None = None
    rename: tuple[tuple[str, str], ...] = ()
    computed: tuple[str, ...] = ()
    mul: dict[str, float] | None = None
    gain: float = 1.0
    grad_gain: float | None = None
    stages: tuple[tuple[int, str], ...] = ()
    channels_last: bool = False
    gradients: Gradients = Gradients.DOT


def record(request: Request) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the content of a golden: its JSON and its arrays.

    Raises:
        RecordError: the model cannot be made or loaded, its outputs are no tensors, not finite, or random.
    """
    if request.channels_last and not request.stages:
        raise RecordError("--channels-last is for the modules of --stage")
    function, source = find_function(request.make, request.path)
    model = make_model(function, request)
    names = golden_keys(model, request)
    load_drawn(model, names, request.mul, request.gain)
    facts = {"variant": request.variant, "params": sum(p.numel() for p in model.parameters()), "mul": request.mul}
    facts |= {"gain": request.gain} if request.gain != 1 else {}
    state = model.state_dict()
    facts["state_dict"] = [[name, [*state[k].shape], str(state[k].dtype)[6:]] for k, name in names.items()]
    facts["inputs"], arrays = record_inputs(model, request)
    has_logits = (first := facts["inputs"][0])["name"] in arrays
    if request.grad_gain is not None and not has_logits:
        raise RecordError("--grad-gain: the model returns no logits, so that no gradients are recorded")
    if has_logits:
        if request.grad_gain is not None:
            facts["grad_gain"] = request.grad_gain
            load_drawn(model, names, request.mul, request.grad_gain)
        facts["grads"] = gradients(model, names, first, request.gradients)
    return facts | {"recorded": how(request, source)}, arrays


def record_inputs(model: nn.Module, request: Request) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    inputs, arrays = [], {}
    for seed, (height, width) in enumerate(request.sizes):
        shape = [1 if seed else 2, 3, height, width]
        given = {"name": f"{height}x{width}", "shape": shape, "seed": seed}
        x = torch.from_numpy(det.det_input(shape, seed))
        outputs, maps = run(model, x, request)
        if not seed:
            check_repeats(model, x, outputs)
        inputs.append(given | {"stages": describe(given["name"], outputs, maps, arrays)})
    return inputs, arrays


def find_function(make: str, path: Path | None) -> tuple[Callable[..., Any], str]:
    """Import MODULE:FUNCTION, from `path` first; return the function, and the commit or version that it is of."""
    module_name, colon, name = make.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise RecordError(f"--make wants MODULE:FUNCTION, got {make!r}")
    if path is not None:
        if not path.is_dir():
            raise RecordError(f"--path {path} is not a folder")
        sys.path.insert(0, str(path.resolve()))
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise RecordError(f"--make: cannot import {module_name}: {first_line(error)}") from error
    if not callable(function := getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RecordError(f"--make: no function {name} in {module_name}{did_you_mean(name, known)}")
    file = Path(getattr(module, "__file__", None) or "")
    in_path = path is not None and file.resolve().is_relative_to(path.resolve())
    return function, commit_of(file) if in_path else version_of(module_name)


def version_of(module: str) -> str:
    """Return name and version of the distribution that a module is installed from."""
    names = metadata.packages_distributions().get(module.split(".")[0], [])
    return " ".join(f"{name} {metadata.version(name)}" for name in names) or "unknown"


def commit_of(file: Path) -> str:
    """Return repository and commit that a file is of, "unknown" where git does not track it.

    "-dirty" follows the commit if tracked files were changed; user names and tokens of the address are left out.
    """

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(file.parent), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", file.name) is None:
        return "unknown"
    commit, address = (
        git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        git("remote", "get-url", "origin"),
    )
    shown = address and re.fullmatch(r"(?:https?://|ssh://|(?=[^/]*@))(?:[^@/]*@)?(.+?)(?:\.git)?/?", address)
    return f"{shown[1]} {commit}" if shown else str(commit)


def make_model(function: Callable[..., Any], request: Request) -> nn.Module:
    try:
        inspect.signature(function).bind(**request.args)
    except (TypeError, ValueError) as error:  # ValueError: a builtin without a signature
        raise RecordError(f"--arg: {request.make}: {first_line(error)}") from error
    model = function(**request.args)
    if not isinstance(model, nn.Module):
        raise RecordError(f"--make: {request.make} returned {type(model).__name__}, not a torch.nn.Module")
    return model.cpu().float().eval()


def golden_keys(model: nn.Module, request: Request) -> dict[str, str]:
    """Return the key in the golden of every key of the model's state dict that is recorded."""
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    for ending in request.computed:
        if not (found := [key for key in keys if key.endswith(ending)]):
            raise RecordError(f"--computed {ending} is the end of no key")
        if trained := [key for key in found if key in parameters]:
            raise RecordError(f"--computed {ending}: {trained[0]} is a parameter")
        keys = [key for key in keys if key not in found]
    names = keys
    for pattern, replacement in request.rename:
        try:
            before, names = names, [re.sub(pattern, replacement, name) for name in names]
        except (re.error, IndexError) as error:
            raise RecordError(f"--rename {pattern}={replacement}: {first_line(error)}") from error
        if names == before:
            raise RecordError(f"--rename {pattern}={replacement} changes no key")
    if twice := {name for name in names if names.count(name) > 1}:
        raise RecordError(f"--rename gives two keys the name {min(twice)}")
    return dict(zip(keys, names, strict=True))


def load_drawn(model: nn.Module, names: dict[str, str], mul: dict[str, float] | None, gain: float) -> None:
    """Load weights drawn by their names in the golden; integer buffers stay as the model computed them."""
    state = model.state_dict()
    if unused := [end for end in mul or () if not any(name.endswith(end) for name in names.values())]:
        raise RecordError(f"--mul {unused[0]} is the end of no key")
    drawn = det.det_state_dict({name: (state[k].shape, state[k].dtype) for k, name in names.items()}, mul, gain)
    weights = {key: drawn[name] for key, name in names.items() if name in drawn}
    model.load_state_dict(weights, strict=False)
    state = model.state_dict()
    if other := [key for key, value in weights.items() if not torch.equal(state[key], value)]:
        raise RecordError(f"{other[0]} does not keep its drawn value (does it share memory with another key?)")


def run(model: nn.Module, x: Tensor, request: Request) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the model's outputs and the maps of its stages (B, C, H, W) or (B, N, C)."""
    modules, maps, handles = dict(model.named_modules()), {}, []
    for index, name in request.stages:
        if name not in modules:
            raise RecordError(f"--stage: no module {name}{did_you_mean(name, modules)}")
        handles.append(modules[name].register_forward_hook(keep_output(maps, f"stage{index}", request.channels_last)))
    with torch.no_grad():
        outputs = named_outputs(model(x))
        for handle in handles:
            handle.remove()
        if not request.stages and hasattr(model, "forward_intermediates"):
            found = model.forward_intermediates(x, intermediates_only=True)
            maps = {f"stage{i}": value for i, value in enumerate(found)}
    if idle := [name for index, name in request.stages if f"stage{index}" not in maps]:
        raise RecordError(f"--stage: the model does not call {idle[0]}")
    for name, value in {**outputs, **maps}.items():
        if not value.isfinite().all():
            raise RecordError(f"{name} is not finite; --mul or --gain make weights smaller")
    return outputs, maps


def keep_output(maps: dict[str, Tensor], name: str, channels_last: bool) -> Callable[..., None]:
    """Return a forward hook that keeps the output, or the first part of a tuple, as `maps[name]`."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if not isinstance(value, Tensor):
            raise RecordError(f"{name} is a {type(value).__name__}, not a tensor")
        if name in maps:
            raise RecordError(f"{name}: the module is called twice")
        value = value.clone()  # a later layer may work in place
        maps[name] = value.permute(0, 3, 1, 2) if channels_last and value.dim() == 4 else value

    return hook


def named_outputs(output: Any) -> dict[str, Tensor]:
    """Name what a model returned: one tensor is the logits, tensors in a list or tuple are out0, out1, ..."""
    if isinstance(output, Tensor):
        return {"logits": output}
    named = {f"out{i}": part for i, part in enumerate(output)} if isinstance(output, list | tuple) else output
    if not isinstance(named, dict) or not named:
        raise RecordError(
            f"the model returned {type(output).__name__}, not a tensor or a list, tuple or dict of tensors"
        )
    if wrong := [(key, value) for key, value in named.items() if not isinstance(value, Tensor)]:
        raise RecordError(f"the model's output {wrong[0][0]} is a {type(wrong[0][1]).__name__}, not a tensor")
    return named


def describe(
    name: str, outputs: dict[str, Tensor], stages: dict[str, Tensor], arrays: dict[str, Any]
) -> dict[str, Any]:
    """Return what the JSON says of one input's maps; whole logits and samples of other outputs go to `arrays`."""
    entries = {key: summary(value) | {"samples": numbers(sample(value, 64))} for key, value in stages.items()}
    for key, value in outputs.items():
        if key == "logits":
            arrays[name] = value.numpy()
        else:
            entries[key], arrays[f"{name}/{key}"] = summary(value), sample(value, DENSE)
    return entries


def summary(value: Tensor) -> dict[str, Any]:
    return {"shape": [*value.shape], "std": numbers([value.double().std(correction=0)])[0]}


def sample(value: Tensor, count: int) -> np.ndarray:
    flat = value.contiguous().flatten().numpy()
    return flat[det.sample_index(flat.size, count)]


def numbers(values: Iterable[Any]) -> list[float]:
    """Round to nine digits, which is exact for float32."""
    return [float(f"{float(value):.9g}") for value in values]


def check_repeats(model: nn.Module, x: Tensor, outputs: dict[str, Tensor]) -> None:
    """Refuse a model that draws random numbers in eval mode (F.dropout without `training`)."""
    with torch.no_grad():
        again = named_outputs(model(x))
    for key, value in outputs.items():
        if (again[key] - value).abs().max() > 1e-3 * value.abs().max():
            raise RecordError(f"{key} of two calls differ: the model draws random numbers in eval mode")


def gradients(model: nn.Module, names: dict[str, str], given: dict[str, Any], form: Gradients) -> dict[str, Any]:
    """Return the gradients of mean(logits * det_input(logits.shape, 7)); parameters without one are left out."""
    out = named_outputs(model(torch.from_numpy(det.det_input(given["shape"], given["seed"]))))["logits"]
    (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
    found = {}
    for key, parameter in model.named_parameters():
        if (grad := parameter.grad) is not None:
            name = names[key]
            found[name] = {"l2": numbers([grad.double().norm()])[0]}
            if form is Gradients.SAMPLES:
                found[name]["samples"] = numbers(sample(grad, 4))
            else:
                probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{name}".encode())))
                found[name]["dot"] = numbers([(grad.double() * probe).sum()])[0]
    return found


def how(request: Request, source: str) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    told = {"make": request.make, "args": request.args, "source": source, "rename": request.rename}
    return told | {"computed": request.computed, "stages": request.stages} | versions
