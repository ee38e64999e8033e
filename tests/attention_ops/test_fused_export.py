"""Routed, HiLo and channel attention and the gates under export for a GPU that is not there: one kernel's node each."""

from unittest import mock

import pytest
import torch
from gates import by_op
from ops import OnMap
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from foveate.attention_ops import (
    BiLevelRoutingAttention,
    BiLevelRoutingAttentionNchw,
    ChannelAttention,
    EfficientChannelAttention,
    EfficientLocalAttention,
    GatedAttention,
    HiLoAttention,
    LargeKernelAttention,
    MohAggregatedAttention,
    ReducedAgentAttention,
    ReversedAttention,
)
from foveate.attention_ops._op import OPS

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


def _undrawn(layer, *args, **kwargs) -> nn.Module:
    """A layer without truncated normal numbers: fake tensors cannot draw them."""
    with mock.patch.object(nn.init, "trunc_normal_"):
        return layer(*args, **kwargs)


LAYERS = {  # the layer, the kernel's op, and what must not be left of the torch body
    "routed": (lambda: BiLevelRoutingAttention(32, 2, 3, 2), "routed_attention_forward", "softmax"),
    "routed nchw": (lambda: BiLevelRoutingAttentionNchw(32, 2, 3, 2), "routed_attention_forward", "softmax"),
    "routes": (lambda: BiLevelRoutingAttention(32, 2, 3, 2), "bi_level_routes_forward", "topk"),
    "agent": (
        lambda: _undrawn(ReducedAgentAttention, 32, 2, map_size=(6, 9), agents=4),
        "agent_attention_forward",
        "softmax",
    ),
    "hilo": (lambda: HiLoAttention(32, 4, 2, 0.5), "local_attention_forward", "_softmax"),
    "clipped": (lambda: OnMap(GatedAttention(32, 2, clip_alpha=2)), "clipped_attention_forward", "_softmax"),
    "reversed": (lambda: OnMap(ReversedAttention(32, 2)), "reversed_attention_forward", "baddbmm"),
    "channel": (lambda: ChannelAttention(32, 2), "channel_attention_forward", "softmax"),
    "large kernel": (lambda: by_op(LargeKernelAttention(32)), "large_kernel_attention_forward", "convolution"),
    "channel gate": (lambda: by_op(EfficientChannelAttention(32)), "channel_gate_forward", "sigmoid"),
    "strip gate": (lambda: by_op(EfficientLocalAttention(32)), "strip_gate_forward", "sigmoid"),
}


def aggregated() -> nn.Module:
    return _undrawn(MohAggregatedAttention, 32, 2, sr_ratio=3, shared=2, routed=0)


LAYERS |= {
    "aggregated": (aggregated, "keys_attention_forward", "embedding_bag"),
    "aggregated, local": (aggregated, "local_mixture_forward", "embedding_bag"),
}
NCHW = ("routed nchw", "large kernel", "channel gate", "strip gate")


def test_every_kernels_op_that_starts_a_forward_pass_is_exported():
    from foveate.kernels import register  # noqa: F401  registers the ops

    registered = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    names = {name.partition(".")[0] for space, _, name in registered if space == "foveate"}
    ops = {name for name in names if not name.startswith("_")} - {*OPS, "bi_level_routes"}
    shown = {op for _, op, _ in LAYERS.values()}
    assert shown == {op for op in ops if not op.endswith("_backward")}, "add a layer to LAYERS"


def exported_targets(layer, x, dynamic_shapes=None):
    program = torch.export.export(layer, (x,), dynamic_shapes=dynamic_shapes).run_decompositions()
    return [str(node.target) for node in program.graph.nodes]


def a_gpu_can_be_faked() -> bool:
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda").uniform_()
    except RuntimeError:  # torch 2.8 asks the driver
        return False
    return True


@pytest.mark.skipif(not a_gpu_can_be_faked(), reason="this torch wants a GPU's driver for fake tensors")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
@pytest.mark.parametrize("kind", LAYERS)
def test_export_for_cuda_shows_the_fused_node(kind, dynamic):
    make, op, left = LAYERS[kind]
    with FakeTensorMode(), torch.device("cuda"):
        layer: nn.Module = make().eval()
        x = torch.empty(2, 12, 18, 32)
        x = x.permute(0, 3, 1, 2) if kind in NCHW else x
        shapes = ({0: Dim("batch", min=2, max=512)},) if dynamic else None
        targets = exported_targets(layer, x, shapes)
    assert targets.count(f"foveate.{op}.default") == 1
    assert kind == "hilo" or not any(left in target for target in targets)


@pytest.mark.parametrize("kind", LAYERS)
def test_export_for_a_cpu_shows_plain_torch(kind):
    make, op, _ = LAYERS[kind]
    x = torch.randn(2, 12, 18, 32)
    x = x.permute(0, 3, 1, 2) if kind in NCHW else x
    assert not any(op in target for target in exported_targets(make().eval(), x))
