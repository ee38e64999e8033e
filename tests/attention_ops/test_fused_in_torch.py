"""The fused bodies under export for a GPU that is not there: opened, the op is one kernel's node."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from foveate.attention_ops import circle_attention, halo_attention, neighborhood_attention, window_attention

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

CALLS = {
    "neighborhood": lambda q, k, v: neighborhood_attention(q, k, v, 3, 2, rpb=q.new_empty(2, 5, 5)),
    "window": lambda q, k, v: window_attention(q, k, v, (2, 3), bias=q.new_empty(2, 6, 6)),
    "circle": lambda q, k, v: circle_attention(q, k, v, 3),
    "halo": lambda q, k, v: halo_attention(q, k, v, 4, 1, rel_h=q.new_empty(11, 16), rel_w=q.new_empty(11, 16)),
}


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attend = CALLS[kind]

    def forward(self, x):  # (B, H, W, 3 * heads * head_dim)
        return self.attend(*x.unflatten(-1, (3, 2, -1)).unbind(3))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
@pytest.mark.parametrize("kind", CALLS)
def test_export_for_cuda_shows_the_fused_node(kind, dynamic):
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(2, 14, 9, 96)
        shapes = ({0: Dim("batch", min=2, max=512)},) if dynamic else None
        program = torch.export.export(Layer(kind), (x,), dynamic_shapes=shapes).run_decompositions()
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("foveate.local_attention_forward.default") == 1
    assert not any("scaled_dot_product" in target or "softmax" in target for target in targets)
