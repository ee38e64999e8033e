"""RandAugment, AutoAugment and AugMix by timm's strings: strict reading, and posterization to 0 bits."""

import re
from collections.abc import Iterable
from typing import Any

from PIL import Image
from timm.data.auto_augment import AugmentOp, posterize, rand_augment_choices

from .._errors import did_you_mean
from .errors import TrainError

_WHOLE, _DECIMAL = r"\d+", r"\d+(\.\d+)?"
_SECTIONS = {  # letters before the number, and its form
    "rand": {"m": _WHOLE, "n": _WHOLE, "p": _DECIMAL, "mstd": _DECIMAL, "mmax": _WHOLE, "inc": "[01]"},
    "augmix": {"m": _WHOLE, "w": _WHOLE, "d": _WHOLE, "a": _DECIMAL, "b": "[01]", "mstd": _DECIMAL},
    **{name: {"mstd": _DECIMAL} for name in ("original", "originalr", "v0", "v0r", "3a")},
}
_TRANSFORMS = ("weights", "3a", "3aw")  # after t, in a rand string
_POSITIVE = ("n", "w", "a", "mmax")


def check_policy(text: str) -> None:
    """Refuse a string that timm would read in part, or not at all.

    Raises:
        TrainError: unknown policy, or a section that is unknown, repeated or out of range.
    """
    policy, *sections = text.split("-")
    if policy not in _SECTIONS:
        raise _wrong(text, f"unknown policy {policy!r}{did_you_mean(policy, _SECTIONS)}")
    values: dict[str, str] = {}
    for section in sections:
        key, value = _split(policy, section)
        if key is None:
            raise _wrong(text, f"unknown section {section!r}; {policy} has {', '.join(_known(policy))}")
        if key in values:
            raise _wrong(text, f"{key} is given twice")
        if (key in _POSITIVE and float(value) == 0) or (key == "p" and not 0 < float(value) <= 1):
            raise _wrong(text, f"{section!r} has no effect, or is no probability")
        values[key] = value
    if "t" in values:
        _check_count(text, values)


def black_at_0_bits(steps: Iterable[Any]) -> None:
    """Let the posterization of augmentation steps give a black image at 0 bits, in place.

    Pillow before 13, with which published models were trained, did this; Pillow 13 refuses 0 bits.
    """
    for step in steps:
        policy = getattr(step, "policy", None)
        ops = [op for part in policy for op in part] if policy is not None else getattr(step, "ops", ())
        for op in ops:
            if isinstance(op, AugmentOp) and op.name.startswith("Posterize"):
                op.aug_fn = posterize_to


def posterize_to(image: Image.Image, bits_to_keep: int, **others: Any) -> Image.Image:
    """Keep the highest bits of each channel; 0 bits give a black image."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep, **others)


def _split(policy: str, section: str) -> tuple[str | None, str]:
    if policy == "rand" and section.startswith("t"):
        return ("t", section[1:]) if section[1:] in _TRANSFORMS else (None, "")
    found = re.fullmatch(r"([a-z]+)(.+)", section)
    form = _SECTIONS[policy].get(found[1]) if found else None
    return (found[1], found[2]) if found and form and re.fullmatch(form, found[2]) else (None, "")


def _known(policy: str) -> list[str]:
    return [f"{key}NUMBER" for key in _SECTIONS[policy]] + [f"t{name}" for name in _TRANSFORMS if policy == "rand"]


def _check_count(text: str, values: dict[str, str]) -> None:
    choices = rand_augment_choices(values["t"], increasing=values.get("inc") == "1")
    if isinstance(choices, dict) and int(values.get("n", 2)) > len(choices):  # drawn without repetition
        raise _wrong(text, f"n{values['n']} of the {len(choices)} transforms of t{values['t']}")


def _wrong(text: str, why: str) -> TrainError:
    return TrainError(f"augment.randaugment: timm cannot read {text!r}: {why}")
