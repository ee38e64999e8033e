"""Settings of int8 files by name: how the ranges of weights and activations are found.

Ranges of weights lie around 0. All settings quantize convolutions and products; norms, softmax and sums stay float32.
"""

from dataclasses import dataclass
from typing import Literal

from .._errors import did_you_mean
from .errors import ExportError

Ranges = Literal["default", "moving", "percentile"]


@dataclass(frozen=True)
class Preset:
    """Settings of one kind of int8 file.

    Attributes:
        images: on which activations are observed, in batches of 8.
        per_channel: weights have a range for every output channel; False: one for the tensor.
        ranges: of activations. "default": all that was observed (ONNX Runtime), or the part of it with the least error
            by a histogram (torchao). "moving": of the first batch, then 0.9 of the old range and 0.1 of a new batch's.
            "percentile": without the 0.01 % at either end.
    """

    images: int = 64
    per_channel: bool = True
    ranges: Ranges = "default"


DEFAULT = Preset()
MOMENTUM = 0.9  # of "moving"
PERCENTILE = 99.99
PRESETS = {
    "default": DEFAULT,
    # Bondarenko, Nagel, Blankevoort 2023, arXiv:2306.12929: 16 batches
    "outlier-free": Preset(images=128, per_channel=False, ranges="moving"),
    "percentile": Preset(ranges="percentile"),
}
OF_TORCHAO = ("default", "moving")  # ranges that it finds


def find_preset(name: str) -> Preset:
    """Return the settings of a name.

    Raises:
        ExportError: there are none.
    """
    if name not in PRESETS:
        raise ExportError(f"quantizer: wanted one of {', '.join(PRESETS)}, got {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]
