"""A gate in every residual block of other people's networks."""

import pytest
import timm
import torch

from foveate.attention_ops import (
    EfficientChannelAttention,
    EfficientLocalAttention,
    SubspaceAttention,
    insert_attention,
)

NETS = {
    "resnet18": 8,  # blocks
    "resnet50": 16,
    "regnetx_002": 13,
    "regnety_002": 13,
    "mobilenetv2_100": 17,
    "mobilenetv3_small_100": 11 - 1,  # the last stage is one convolution; 10 blocks and a plain separable one
    "efficientnet_b0": 16,
}
KINDS = {"eca": EfficientChannelAttention, "ela": EfficientLocalAttention, "ulsam": SubspaceAttention}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETS)
def test_every_block_has_a_gate_that_learns(name, kind):
    torch.manual_seed(0)
    model = insert_attention(timm.create_model(name, num_classes=3), kind)
    gates = [module for module in model.modules() if isinstance(module, KINDS[kind])]
    blocks = [module for module in model.modules() if hasattr(module, "se")]
    assert len(gates) == len(blocks) == sum(isinstance(block.se, KINDS[kind]) for block in blocks)
    assert len(gates) >= NETS[name]
    for norm in model.modules():  # timm starts residual branches at zero
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(norm.weight)
    model(torch.randn(2, 3, 64, 96)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for gate in gates for p in gate.parameters() if p.dim() > 1)


def test_eca_in_a_plain_resnet_is_timms_ecaresnet():
    torch.manual_seed(0)
    theirs = timm.create_model("ecaresnet26t", zero_init_last=False).eval()
    ours = insert_attention(timm.create_model("resnet26t"), "eca").eval()
    ours.load_state_dict(theirs.state_dict())  # the same names
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_arguments_reach_the_gates_and_they_follow_the_model():
    model = insert_attention(timm.create_model("resnet18").eval().to(torch.bfloat16), "eca", kernel_size=9)
    gate = model.layer1[0].se
    assert gate.conv.weight.shape == (1, 1, 9)
    assert gate.conv.weight.dtype == torch.bfloat16
    assert not gate.training


def test_nets_without_a_slot_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="no block of Sequential has a slot named 'se'"):
        insert_attention(torch.nn.Sequential(torch.nn.Linear(2, 2)), "eca")
    with pytest.raises(ValueError, match=r"kind must be one of \['eca', 'ela', 'ulsam', .*'agent'.*\], got 'se'"):
        insert_attention(timm.create_model("resnet18"), "se")


def test_the_groups_of_ulsam_reach_the_gates_and_must_divide_the_channels():
    model = insert_attention(timm.create_model("resnet18"), "ulsam", groups=8)
    assert model.layer1[0].se.conv_point.weight.shape == (8, 8, 1, 1)
    with pytest.raises(ValueError, match="groups must divide the 64 channels, got 5"):
        insert_attention(timm.create_model("resnet18"), "ulsam", groups=5)
