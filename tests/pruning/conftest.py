"""Small models of every family, with weights that are not near zero."""

import pytest
import timm
import torch
from torch import nn

NAT = {"dims": (32, 64), "depths": (1, 2), "kernel_size": 3, "head_dim": 8}
BIFORMER = {"dims": (16, 32), "depths": (1, 1), "topks": (2, None), "head_dim": 8, "dense_heads": 4, "regions": 3}
AGENT = {"dims": (16, 32), "depths": (1, 2), "heads": (2, 4), "agent_num": (4, 4), "img_size": 40}
VIT = {"patch_size": 8, "img_size": 40, "embed_dim": 32, "depth": 2, "num_heads": 4}
SMALL = {
    "nat_mini": NAT,
    "nat_small": NAT,  # layer scales
    "dinat_s_tiny": NAT | {"dilations": ((1,), (1, 2))},
    "vitrpb_small": {"dims": (32,) * 3, "depths": (1,) * 3, "kernel_size": 4, "head_dim": 8},
    "van_b0": {"dims": (8, 16), "depths": (1, 1), "mlp_ratios": (2, 2)},
    "biformer_tiny": BIFORMER,
    "biformer_stl_nchw": BIFORMER,
    "litv2_small": {"dims": (16, 32), "depths": (1, 1), "windows": (None, 2), "head_dim": 8, "alpha": 0.5},
    "fv_davit_tiny": {"dims": (16, 32), "depths": (1, 1), "head_dim": 8, "window_size": 3},
    "fv_davit_base_fl": {"dims": (16, 32), "depths": (1, 1), "head_dim": 8, "window_size": 3, "num_classes": 5},
    "fv_halonet_h0": {"depths": (1, 1, 1, 2), "block_size": 4, "halo": 1},
    "fv_halonet_h5": {"depths": (1, 1, 1, 1), "block_size": 4, "halo": 1, "final_dim": 40},
    "fv_halonet26t": {"block_size": 4, "halo": 1},
    "fv_sehalonet33ts": {"block_size": 4, "halo": 1},
    "fv_eca_halonext26ts": {"block_size": 4, "halo": 1},
    "fv_haloregnetz_b": {"block_size": 4, "halo": 1},
    "eca_resnet18": {"depths": (1, 1, 1, 1)},
    "eca_resnet50": {"depths": (1, 1, 1, 1)},
    "eca_mobilenet_v2": {"depths": (1, 1, 1, 1, 1, 1, 1)},
    "ela_resnet18_t": {"depths": (1, 1, 1, 1)},
    "ela_resnet50_l": {"depths": (1, 1, 1, 2)},
    "ela_mobilenet_v2_s": {"depths": (1, 2, 1, 1, 1, 1, 1)},
    "gqa_vit_tiny": {
        "embed_dim": 24, "depth": 2, "num_heads": 6, "kv_heads": 3, "patch_size": 8, "img_size": 40,
        "allocation": "key_norm",
    },
    "ulsam_mobilenetv1": {"depths": (1, 2, 1, 2, 1), "insert": (3,), "replace": (7,)},
    "ulsam_mobilenetv2": {"depths": (1, 2, 1, 1, 2, 2, 1), "insert": (3,), "replace": (8,)},
    "ninformer": {"dims": (16, 16), "depths": (1, 1), "hidden_dim": 24, "img_size": 40},
    "flowformer_cv": {"dims": (16, 32), "depths": (1, 2), "heads": 2, "img_size": 40},
    "moh_transnext_small_75": {
        "dims": (16, 32), "depths": (1, 2), "heads": (4, 8), "shared": (2, 1), "routed": (1, 3), "mlp_ratios": (2, 2),
        "sr_ratios": (4, 1),
    },
    "mixer_vit_tiny": {"dims": (16,) * 2, "depths": (1,) * 2, "heads": 2, "patch_size": 8},
    "agent_deit_tiny": {
        "dim": 16, "depth": 3, "heads": 2, "patch_size": 8, "agent_num": (4,) * 4, "img_size": 40, "agent_layer": 2
    },
    "agent_pvt_tiny": AGENT | {"attn_type": "AB", "mlp_ratios": (2, 2), "agent_sr_ratios": "21", "sr_ratios": "21"},
    "agent_swin_tiny": AGENT | {"attn_type": "AB"},
    "agent_cswin_tiny": AGENT | {"attn_type": "AB", "split_size": "21"},
    "quantizable_vit_tiny": VIT | {"softmax_clip": (-0.01, 1.0)},
    "sparsifiner_deit_tiny": VIT | {"keep": 1.0},  # so that cut channels choose no other keys
    "dependencyvit_tiny": VIT,
    "test_vit": {"img_size": 48},
    "test_resnet": {},
    "test_convnext": {},
    "swin_tiny_patch4_window7_224": {
        "img_size": 56, "window_size": 7, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)
    },
    "davit_tiny": {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 4)},
}  # fmt: skip
PX = 40  # not a multiple of the stride 32
# deep, and stirred: float32 noise grows to 1e-4 of the logits; tokens choose heads by comparison
DOUBLE = ("fv_sehalonet33ts", "fv_haloregnetz_b", "moh_transnext_small_75")
KINDS = {  # what each can lose; the rest is refused
    "nat_mini": "heads channels mlp",
    "nat_small": "heads channels mlp",
    "dinat_s_tiny": "heads channels mlp",
    "vitrpb_small": "heads channels mlp",
    "van_b0": "mlp conv",
    "biformer_tiny": "heads channels mlp",
    "biformer_stl_nchw": "heads channels mlp",
    "litv2_small": "heads mlp",
    "fv_davit_tiny": "heads channels mlp",
    "fv_davit_base_fl": "heads channels mlp",
    "fv_halonet_h0": "heads channels conv width",
    "fv_halonet_h5": "heads channels conv width",
    "fv_halonet26t": "heads channels conv width",
    "fv_sehalonet33ts": "heads channels conv width",
    "fv_eca_halonext26ts": "heads channels conv width",
    "fv_haloregnetz_b": "heads channels conv width",
    "eca_resnet18": "conv",
    "eca_resnet50": "conv",
    "eca_mobilenet_v2": "conv",
    "ela_resnet18_t": "conv",
    "ela_resnet50_l": "conv width",
    "ela_mobilenet_v2_s": "conv width",
    "gqa_vit_tiny": "mlp",
    "ulsam_mobilenetv1": "conv",
    "ulsam_mobilenetv2": "conv width",
    "ninformer": "mlp",
    "flowformer_cv": "heads mlp",
    "moh_transnext_small_75": "heads mlp",
    "mixer_vit_tiny": "mlp",
    "agent_deit_tiny": "heads channels mlp",
    "agent_pvt_tiny": "heads mlp",
    "agent_swin_tiny": "heads channels mlp",
    "agent_cswin_tiny": "mlp",
    "quantizable_vit_tiny": "heads channels mlp",
    "sparsifiner_deit_tiny": "heads channels mlp",
    "dependencyvit_tiny": "channels mlp",
    "test_vit": "heads mlp",
    "test_resnet": "conv width",
    "test_convnext": "mlp",
    "swin_tiny_patch4_window7_224": "heads mlp",
    "davit_tiny": "mlp",
}


def stir(model: nn.Module) -> nn.Module:
    """Give every weight, bias and statistic a value of its own: what starts at 0 or 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator).abs() + name.endswith("var"))
    return model.eval()


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the tensors are tiny."""


@pytest.fixture(scope="session")
def small():
    """A function from a name of SMALL to a model."""

    def make(name: str, **kwargs) -> nn.Module:
        torch.manual_seed(0)
        net = stir(timm.create_model(name, **({"num_classes": 7} | SMALL[name] | kwargs)))
        return net.double() if name in DOUBLE else net

    return make


@pytest.fixture(scope="session")
def images():
    """A function from a name of SMALL to two images for its model."""

    def make(name: str) -> torch.Tensor:
        px, dtype = SMALL[name].get("img_size", PX), torch.float64 if name in DOUBLE else torch.float32
        return torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(2)).to(dtype)

    return make
