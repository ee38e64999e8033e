"""What users write as `key=value`, and which arguments a model's name may be given by text or by a file."""

import ast
from collections.abc import Iterable, Mapping
from typing import Any

from ._errors import first_line

_WORDS = {"true": True, "false": False, "none": None}
_LONGEST = 10_000  # characters of a value
# Arguments of timm's factory that read other files, load less strictly, or return something else than a classifier.
FACTORY_ARGS = frozenset(
    "name model_name checkpoint checkpoint_path cache_dir pretrained pretrained_cfg pretrained_cfg_overlay "
    "pretrained_strict pretrained_filter_fn pretrained_model_args model_cfg feature_cfg kwargs_filter scriptable "
    "exportable no_jit".split()
)
FEATURE_ARGS = frozenset(("features_only", "out_indices", "feature_cls"))


class OptionError(ValueError):
    """An option that cannot be read; the message names it."""


def parse_options(pairs: Iterable[str], option: str, *, dotted: bool = False) -> dict[str, Any]:
    """Read `key=value` words: a value is a Python literal (3, 1e-4, (32, 64), None) or, failing that, the text itself.

    Of a key that is given twice the last value counts.

    Args:
        option: the name of the command's option, for messages.
        dotted: keys may be dotted paths.

    Raises:
        OptionError: no key, a key that is no name, or a value that is no plain data.
    """
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not all(part.isidentifier() for part in (key.split(".") if dotted else [key])):
            raise OptionError(f"{option} wants key=value, got {pair[:100]!r}")
        parsed[key] = _parse_value(text.strip(), f"{option} {key}")
    return parsed


def parse_model_args(pairs: Iterable[str] | None) -> dict[str, Any]:
    """Read the `key=value` words of --model-arg, which only a model's own arguments may be.

    Raises:
        OptionError: as `parse_options` and `check_model_args`.
    """
    arguments = parse_options(pairs or (), "--model-arg")
    check_model_args(arguments, "--model-arg")
    return arguments


def check_model_args(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse arguments of timm's factory, which are not the model's own.

    Raises:
        OptionError: one of them is there.
    """
    if taken := sorted(FACTORY_ARGS & set(arguments)):
        raise OptionError(f"{where}: {taken[0]} is an argument of timm's loader, not of a model")


def _parse_value(text: str, where: str) -> Any:
    if len(text) > _LONGEST:
        raise OptionError(f"{where}: a value has at most {_LONGEST} characters, got {len(text)}")
    if text.lower() in _WORDS:  # in any case: the text "false" would be true
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    except (TypeError, RecursionError, MemoryError) as error:  # {[1]: 2}, and brackets nested hundreds deep
        raise OptionError(f"{where}: {first_line(error)} in {text[:40]!r}") from error
