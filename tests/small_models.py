"""Small models of every family and of each kind of block: what each is built with."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import timm
import torch
from torch import Tensor, nn

import foveate  # noqa: F401  (registers the models)

NAT = {"dims": (32, 64), "depths": (1, 2), "kernel_size": 3}
BIFORMER = {"dims": (16, 32), "depths": (1, 1), "topks": (2, None), "head_dim": 8, "regions": 3}
LITV2 = {"dims": (16, 32), "depths": (1, 1), "windows": (None, 2), "head_dim": 8}
DAVIT = {"dims": (16, 32), "depths": (1, 1), "head_dim": 8, "window_size": 3}
AGENT = {"dims": (16, 32), "depths": (1, 2), "heads": (2, 4), "agent_num": (4, 9), "img_size": 48}
AGENT_PVT = {**AGENT, "attn_type": "AA", "mlp_ratios": (2, 2), "agent_sr_ratios": "11", "sr_ratios": "21"}
AGENT_DEIT = {"dim": 16, "depth": 3, "heads": 2, "patch_size": 8, "agent_num": (4, 4, 9, 9), "img_size": 48}
HALO = {"block_size": 4, "halo": 1}
MOH = {"dims": (16, 32), "depths": (1, 1), "heads": (2, 4), "shared": (2, 1), "routed": (0, 2), "mlp_ratios": (2, 2)}
MOH |= {"sr_ratios": (4, 1)}
MIXER = {"dims": (16,) * 3, "depths": (1,) * 3, "heads": 2, "patch_size": 8, "mlp_ratio": 2.0}
FOUR_BLOCKS = {"depths": (1, 1, 1, 1)}
MOBILENET = {"depths": (1, 1, 1, 1, 2, 2, 1)}
GQA = {"embed_dim": 24, "depth": 2, "num_heads": 6, "kv_heads": 3, "patch_size": 8, "img_size": 32}
VIT = {"patch_size": 8, "img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}

SMALL = {  # one of every family; the key is a model's name, "name:kind" where a name stands for several models
    "nat_mini": NAT,
    "dinat_s_tiny": {"dims": (32, 64), "depths": (1, 2), "dilations": ((1,), (1, 2)), "kernel_size": 3},
    "vitrpb_small": {"dims": (32,) * 3, "depths": (1,) * 3, "kernel_size": 4},
    "van_b0": {"dims": (8, 16), "depths": (1, 1), "mlp_ratios": (2, 2)},
    "biformer_tiny": BIFORMER,
    "biformer_stl_nchw": BIFORMER,
    "litv2_small": LITV2,
    "fv_davit_tiny": DAVIT,
    "fv_davit_base_fl": {**DAVIT, "num_classes": 1000},
    "fv_halonet_h0": {**FOUR_BLOCKS, **HALO},
    "eca_resnet18": FOUR_BLOCKS,
    "eca_mobilenet_v2": MOBILENET,
    "ela_resnet18_b": FOUR_BLOCKS,
    "ela_mobilenet_v2_l": MOBILENET,
    "gqa_vit_tiny": GQA,
    "ulsam_mobilenetv2": {"depths": (1, 3, 1, 1, 1, 1, 1), "insert": (6,), "replace": (4,)},
    "moh_transnext_small_75": MOH,
    "mixer_vit_tiny": MIXER,
    "agent_deit_tiny": {**AGENT_DEIT, "global_pool": "avg"},  # else nothing reads the last block's convolution
    "agent_pvt_tiny": AGENT_PVT,
    "agent_swin_tiny": {**AGENT, "attn_type": "AB"},
    "agent_cswin_tiny": {**AGENT, "attn_type": "AB", "split_size": "21"},
    "quantizable_vit_tiny": {**VIT, "softmax_clip": (-0.01, 1.0), "gate": "linear"},
    "sparsifiner_deit_tiny": {**VIT, "global_pool": "avg"},  # the class token alone would not see the last choice
    "dependencyvit_tiny": VIT,
}
FIXED = {  # models that take images of one size; they have tests of their own, tests/backbones/test_fixed_sizes.py
    "flowformer_cv": {"dims": (16, 32), "depths": (1, 1), "heads": 2, "mlp_ratio": 2.0, "img_size": (32, 40)},
}
KINDS = {  # and the other kinds of blocks
    **SMALL,
    "dinat_mini": {**NAT, "dilations": ((1,), (1, 2)), "layer_scale": 1.0},
    "nat_mini:dropout": {**NAT, "drop_path_rate": 0.2, "proj_drop_rate": 0.2, "drop_rate": 0.2},
    "biformer_stl": BIFORMER,
    "biformer_tiny:conv": {**BIFORMER, "topks": ("conv", "plain"), "mlp_conv": True, "pre_norm": False},
    "litv2_small:alpha0": {**LITV2, "windows": (2, 2), "alpha": 0.0},
    "litv2_small:alpha1": {**LITV2, "windows": (2, 2), "alpha": 1.0},
    "litv2_small:mixed": {**LITV2, "windows": (1, 2), "alpha": 0.5},
    "agent_deit_tiny:mixed": {**AGENT_DEIT, "agent_layer": 1, "downstream_agent_shapes": ((3, 2),) * 4},
    "agent_pvt_tiny:mixed": {**AGENT_PVT, "attn_type": "BM1", "agent_sr_ratios": "12"},
    "agent_swin_tiny:mixed": {**AGENT, "attn_type": "BM1", "downstream_agent_shapes": ((2, 3), (3, 2))},
    "agent_cswin_tiny:stripes": {**AGENT, "attn_type": "AM1", "la_split_size": "43", "split_size": "22"},
    "fv_halonet_h0:wide": {**FOUR_BLOCKS, **HALO, "value_ratio": 2.0, "output_ratio": 2, "final_dim": 48},
    "fv_halonet26t": HALO,
    "fv_sehalonet33ts": HALO,
    "fv_eca_halonext26ts": HALO,
    "fv_haloregnetz_b": HALO,
    "eca_resnet50": FOUR_BLOCKS,
    "ela_resnet50_l": FOUR_BLOCKS,
    "gqa_vit_tiny:key_norm": {**GQA, "allocation": "key_norm"},
    "ulsam_mobilenetv1": {"depths": (1, 2, 1, 2, 1), "insert": (3, 5), "replace": (4,)},
    "moh_transnext_small_75:aggregated": {**MOH, "sr_ratios": (4, 2), "fixed_pool_size": 2, "pretrain_size": 64},
    "mixer_vit_tiny:flow": {**MIXER, "mixer": "flow"},
    "mixer_vit_tiny:circle": {**MIXER, "mixer": "circle", "radius": 2, "qk_norm": True},
    "mixer_vit_tiny:routing": {**MIXER, "mixer": "routing", "clusters": 2},
    "mixer_vit_tiny:nprf": {**MIXER, "mixer": "nprf", "features": 8, "img_size": 256},
    "quantizable_vit_tiny:mlp": {**VIT, "gate": "mlp", "patch_norm": True},
    "quantizable_vit_tiny:per head": {**VIT, "gate": "per_head", "clip_alpha": 2},
    "dependencyvit_tiny:positions": {**VIT, "cpe_depth": 0, "learned_pos": True},
}
ONE_SIZE = {  # models of one image size, which most tests of SMALL change: those of their own test files
    "ninformer": {"dims": (16, 16), "depths": (1, 1), "hidden_dim": 24},
}
EVERY = {**KINDS, **FIXED, **ONE_SIZE}
SIZES: dict[str, Any] = {
    **{name: kwargs["img_size"] for name, kwargs in FIXED.items()},
    "ninformer": (32, 32),
}  # of the others
GATED = ("fv_halo", "fv_se", "fv_eca", "eca", "ela", "ulsam")
OF_TIMMS_CLASSES = tuple(name for name in KINDS if name.startswith(GATED))
VITS = tuple(name for name in KINDS if name.startswith(("gqa", "quantizable", "sparsifiner", "dependencyvit")))
WITH_CLASS_TOKEN = ("agent_deit_tiny",)  # their tokens are no map, and their children no chain
SCALED = (
    "nat_mini",
    "dinat_s_tiny",
    "vitrpb_small",
    "dependencyvit_tiny",
)  # layer scale may start near zero


def small(name: str, **kwargs) -> nn.Module:
    """Build the small model of that name; the same weights at every call."""
    torch.manual_seed(0)
    return timm.create_model(name.partition(":")[0], **{**EVERY[name], **kwargs})


def size_of_images(name: str) -> tuple[int, int]:
    """Return (rows, columns) of images for the model: 64 x 64 where it takes any size."""
    return SIZES.get(name, (64, 64))


@torch.no_grad()
def alive(model: nn.Module) -> nn.Module:
    """Draw weights and statistics with which every layer changes the output, and return the model in eval mode."""
    generator = torch.Generator().manual_seed(1)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in model.modules():
        scales = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm)
        for name, tensor in module.named_parameters(recurse=False):
            noise = torch.randn(tensor.shape, generator=generator)
            if "scale" in name or "gamma" in name or (scales and name == "weight"):
                tensor.copy_(1 + 0.5 * noise.clamp(-1.5, 1.5))
            elif name == "weight":
                tensor.copy_(1.5 * noise * tensor[0].numel() ** -0.5)
            else:
                tensor.copy_(0.5 * noise)
    model.eval()
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        model(torch.randn(8, 3, 64, 64, generator=generator))  # statistics of such images: no layer fades out
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@torch.no_grad()
def check_outputs(model: nn.Module, run: Callable[[Tensor], Tensor], batches: Iterable[Tensor], noise: float) -> None:
    """Compare what a file computes with the model in float64: 1e-4 of std, and `noise` times the model's own error.

    With random weights, PyTorch in float32 is wrong by up to 1e-4 of std too, depending on the images.
    """
    exact = deepcopy(model).double()
    for images in batches:
        wanted, plain, found = exact(images.double()), model(images), run(images)
        allowed = 1e-4 * wanted.std() + noise * (plain - wanted).abs().max()
        assert (found - wanted).abs().max() <= allowed, tuple(images.shape)
