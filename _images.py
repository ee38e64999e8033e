"""Images as Pillow opens them, with 8 bits per channel: the same for training and for exported files."""

import numpy as np
from PIL import Image

_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow's modes of 16-bit gray; "I" in older releases
_DEEPEST = 65535


def with_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray to 8 bits, rounded to nearest; Pillow's own conversion clips it at 255. Others pass.

    Raises:
        ValueError: 32-bit pixels, whose range is not known.
    """
    if image.mode == "F":
        raise ValueError("32-bit floats have no known range; save it with 8 or 16 bits")
    if image.mode not in _DEEP:
        return image
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > _DEEPEST:
        raise ValueError("32-bit integers have no known range; save it with 8 or 16 bits")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
