"""Find recipe files, load them through MMEngine's lazy configs, and lay overrides over them."""

import ast
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from .._errors import did_you_mean, first_line
from .errors import TrainError
from .recipe import Recipe, read_recipe, recipe_data

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

_WORDS = {"true": True, "false": False, "none": None}


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe, given its path or the bare name of one that comes with the package."""
    path = Path(name)
    if path.is_file():
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

    Args:
        source: a name or path as `find_recipe` takes it, a loaded MMEngine config, plain data, or a recipe.
        cfg_options: dotted keys to values, such as {"schedule.epochs": 3}; checked like the file itself.

    Raises:
        TrainError: the file cannot be read, or says something that a recipe cannot say.
    """
    if isinstance(source, str | Path):
        data = _load_file(find_recipe(source))
    elif isinstance(source, Recipe):
        data = recipe_data(source)
    else:
        data = source.to_dict() if isinstance(source, Config) else dict(source)
    for key, value in (cfg_options or {}).items():
        data = _override(data, key, key.split("."), value)
    return read_recipe(_with_widths(data))


def _with_widths(data: dict[str, Any]) -> dict[str, Any]:
    """Put the widths of a pruned model where the recipe names the config.json of its folder.

    A family of timm's takes none: the name in that file builds it, and is told `of` which model.
    """
    model = data.get("model")
    if not (isinstance(model, Mapping) and isinstance(path := model.get("widths"), str)):
        return data
    try:
        config = json.loads(Path(path).read_text())
        found = {"widths": config["model_args"]["widths"]}
        if "of" in config["model_args"]:
            found |= {"of": config["model_args"]["of"], "name": config["architecture"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"model.widths {path} is no config.json of a pruned model: {first_line(error)}") from error
    whole, name = found.get("of"), str(model.get("name")).partition(".")[0]
    if whole is not None and name not in (whole, found["name"]):
        raise TrainError(f"model.widths {path} was cut from {whole}, not {name}")
    return {**data, "model": {**model, **found}}


def parse_options(options: Iterable[str]) -> dict[str, Any]:
    """Read `key=value` words: a value is a Python literal (3, 1e-4, (32, 64), None) or, failing that, a string."""
    parsed = {}
    for option in options:
        key, separator, text = option.partition("=")
        if not separator or not key.strip():
            raise TrainError(f"--cfg-options: wanted key=value, got {option!r}")
        parsed[key.strip()] = _parse_value(text.strip())
    return parsed


def _parse_value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _load_file(path: Path) -> dict[str, Any]:
    try:
        return Config.fromfile(path).to_dict()
    except Exception as error:  # a recipe is Python: anything can go wrong in it
        raise TrainError(f"recipe {path} cannot be read: {type(error).__name__}: {first_line(error)}") from error


def _override(data: Any, key: str, path: list[str], value: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise TrainError(f"unknown key {key}: {key.removesuffix('.' + '.'.join(path))} holds a value, not a section")
    name, *rest = path
    return {**data, name: _override(data.get(name, {}), key, rest, value) if rest else value}
