"""What the tests of `foveate.fuse` share: models of timm, images, and the comparison with a model in float64."""

from copy import deepcopy

import torch
from torch import nn

SIZE = (2, 3, 40, 56)
TIMM = {  # one of each kind of model that people serve, small
    "resnet18": {"layers": (1, 1, 1, 1)},
    "resnet50": {"layers": (1, 1, 1, 1)},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16, "img_size": 56},
    "swinv2_tiny_window8_256": {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16, "img_size": 64},
    "davit_tiny": {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 4)},
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 48},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "halonet26t": {},
    "ecaresnet26t": {},
    "maxvit_pico_rw_256": {"img_size": 64},
    "coatnet_pico_rw_224": {"img_size": 64},
}
UNNAMED = ("mobilenetv3_small_050", "regnety_002", "test_byobnet", "poolformerv2_s12", "mixer_s32_224")
SIZES = {"swin_tiny_patch4_window7_224": 56, "swinv2_tiny_window8_256": 64, "vit_tiny_patch16_224": 48}
SIZES |= {"halonet26t": 256, "maxvit_pico_rw_256": 64, "coatnet_pico_rw_224": 64, "mixer_s32_224": 224}


def images(size=SIZE, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(2)).to(dtype)


def assert_same(fused: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    """Compare with the model in float64: a fused model may err 16 times as much as the model itself does."""
    with torch.no_grad():
        out, plain, exact = fused(x).double(), model(x).double(), deepcopy(model).double()(x.double())
    unit = exact.std()
    least = 1e-11 if x.dtype == torch.float64 else 2e-5
    allowed = max(least * unit, 16 * (plain - exact).abs().max())
    assert (out - exact).abs().max() <= allowed < 1e-2 * unit, ((out - exact).abs().max() / unit).item()
