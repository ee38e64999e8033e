"""Find recipe files, load them (Python through MMEngine's configs, JSON and YAML as data), and apply overrides."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from .._errors import did_you_mean, first_line
from .._files import UnreadableFileError, check_plain, read_json, read_text
from .errors import TrainError
from .recipe import Recipe, read_recipe, recipe_data

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

_LENGTHS: dict[str, Callable[[float], float]] = {
    "warmup_epochs": lambda epochs: float(f"{epochs:.4g}"),
    "cooldown_epochs": round,
    "step_epochs": lambda epochs: max(1, round(epochs)),
}
_LARGEST_BYTES = 2**20  # limit of a JSON or YAML recipe; 16 times as much for a config.json
_VALUES = 100_000  # in a recipe


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe, given its path or the name of a recipe of the package."""
    path = Path(name)
    if os.path.isfile(path):  # unlike Path.is_file, False for any name
        return path
    if path.parent == Path(".") and path.name.removesuffix(".py") in list_recipes():
        return CONFIGS / f"{path.name.removesuffix('.py')}.py"
    if path.parent != Path("."):
        raise TrainError(f"recipe {name} is not a file")
    raise TrainError(f"unknown recipe {name}" + did_you_mean(path.name.removesuffix(".py"), list_recipes()))


def load_recipe(
    source: str | Path | Mapping[str, Any] | Config | Recipe, cfg_options: Mapping[str, Any] | None = None
) -> Recipe:
    """Load, override and check a recipe.

    A .py file runs as Python: load only files that you trust. A .json or .yaml file is data and runs nothing.

    Args:
        source: a name or path for `find_recipe`, a loaded MMEngine config, plain data, or a recipe.
        cfg_options: dotted keys to values, such as {"schedule.epochs": 3}; checked like the file itself.

    Raises:
        TrainError: the file cannot be read, or holds unknown keys or invalid values.
    """
    return load_recipe_with_notes(source, cfg_options)[0]


def load_recipe_with_notes(
    source: str | Path | Mapping[str, Any] | Config | Recipe, cfg_options: Mapping[str, Any] | None = None
) -> tuple[Recipe, list[str]]:
    """Return what `load_recipe` returns, and a line for each value that was derived from an override.

    `schedule.epochs` alone, with fewer epochs than the recipe has, shortens warm-up, cool-down and steps in proportion.
    """
    if isinstance(source, str | Path):
        data = _load_file(find_recipe(source))
    elif isinstance(source, Recipe):
        data = recipe_data(source)
    else:
        data = _config_data(source) if isinstance(source, Config) else dict(source)
    _check_plain(data)
    derived = _shortened(data, cfg_options or {})
    for key, value in {**(cfg_options or {}), **derived}.items():
        data = _override(data, key, key.split("."), value)
    named = ", ".join(f"{key}={value}" for key, value in derived.items())
    notes = [f"schedule.epochs={(cfg_options or {})['schedule.epochs']} shortens: {named}"] if derived else []
    return read_recipe(_with_widths(data)), notes


def _shortened(data: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the other lengths of a schedule whose `epochs` an override makes shorter, as dotted keys."""
    schedule, epochs = data.get("schedule"), options.get("schedule.epochs")
    if not isinstance(schedule, Mapping):
        return {}
    before = schedule.get("epochs")
    if type(epochs) is not int or type(before) is not int or not 0 < epochs < before:
        return {}
    derived = {}
    for name, make in _LENGTHS.items():
        key, value = f"schedule.{name}", schedule.get(name)
        if key not in options and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            derived[key] = make(value * epochs / before)
    return derived


def _with_widths(data: dict[str, Any]) -> dict[str, Any]:
    """Replace the path of a pruned model's config.json in `model.widths` by the widths in that file.

    Models of timm have no argument `widths`: the name in that file builds them, and `of` names the original model.
    """
    model = data.get("model")
    if not (isinstance(model, Mapping) and isinstance(path := model.get("widths"), str)):
        return data
    try:
        config = read_json(Path(path), 16 * _LARGEST_BYTES)
        found = {"widths": config["model_args"]["widths"]}
        if "of" in config["model_args"]:
            found |= {"of": config["model_args"]["of"], "name": config["architecture"]}
    except (ValueError, KeyError, TypeError) as error:
        why = first_line(error)
        raise TrainError(f"model.widths {path} is not the config.json of a pruned model: {why}") from error
    whole, name = found.get("of"), str(model.get("name")).partition(".")[0]
    if whole is not None and name not in (whole, found["name"]):
        raise TrainError(f"model.widths {path} was cut from {whole}, not {name}")
    return {**data, "model": {**model, **found}}


def _load_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".py":
        return _run_python(path)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise TrainError(f"recipe {path}: wanted a name that ends in .py, .json, .yaml or .yml")
    try:
        data = read_json(path, _LARGEST_BYTES) if path.suffix == ".json" else _read_yaml(path)
    except UnreadableFileError as error:
        raise TrainError(f"recipe {path} {error}") from error
    if not isinstance(data, dict):
        raise TrainError(f"recipe {path} does not hold sections of keys")
    return data


def _read_yaml(path: Path) -> Any:
    text = read_text(path, _LARGEST_BYTES)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UnreadableFileError(f"is not plain YAML: {first_line(error)}") from error


def _run_python(path: Path) -> dict[str, Any]:
    try:
        return _config_data(Config.fromfile(path))
    except TrainError:
        raise
    except Exception as error:  # a Python recipe can raise anything
        raise TrainError(f"recipe {path} cannot be read: {type(error).__name__}: {first_line(error)}") from error


def _config_data(config: Config) -> dict[str, Any]:
    """Return a config as plain data. Classes of hooks that a Python recipe imports become registered names."""
    data = config.to_dict()
    if isinstance(data.get("hooks"), list | tuple):
        pairs = zip(config.hooks, data["hooks"], strict=True)
        data["hooks"] = [_with_name(live, plain) for live, plain in pairs]
    return data


def _with_name(live: Any, plain: Any) -> Any:
    kind = live.get("type") if isinstance(live, Mapping) else None
    if not isinstance(kind, type):
        return plain
    if not issubclass(kind, Hook):
        raise TrainError(f"hooks: {kind.__name__} is not an MMEngine hook")
    if HOOKS.module_dict.setdefault(kind.__name__, kind) is not kind:
        raise TrainError(f"hooks: another hook is registered as {kind.__name__}")
    return plain | {"type": kind.__name__}


def _check_plain(data: Any) -> None:
    """Refuse data that is nested too deep, or too large because of shared parts (YAML aliases)."""
    try:
        check_plain(data, _VALUES)
    except ValueError as error:
        raise TrainError(f"the recipe is not plain data: {error}") from error


def _override(data: Any, key: str, path: list[str], value: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise TrainError(f"unknown key {key}: {key.removesuffix('.' + '.'.join(path))} holds a value, not a section")
    name, *rest = path
    return {**data, name: _override(data.get(name, {}), key, rest, value) if rest else value}
