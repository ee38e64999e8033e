"""The roofline runs every kind of layer through the launchers as they are."""

import pytest

from foveate.benchmarks._layers import LAYERS
from foveate.benchmarks.roofline import rows_of

CLOSED = {"local_closed_forward_kernel", "local_backward_kernel"}
OPEN = {"local_forward_kernel", "local_dq_kernel", "local_dkv_kernel"}
ROUTED = {"forward_kernel", "queries_kernel", "keys_kernel"}
KERNELS = {  # of one layer of each kind
    "NAT-T 7x7 x16": CLOSED,
    "NAT-T 14x14 x8": OPEN | {"local_bias_kernel"},
    "Swin-T 7x7 x24 win 7": CLOSED,
    "HaloNet-H1 16x16 x8 8+3": OPEN,
    "BiFormer 14x14 x8 top 16": ROUTED,
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_of_a_layer_are_counted(name):
    (layer,) = (layer for layer in LAYERS if layer.name == name)
    rows = rows_of(layer, 1, 90)
    assert {row.code.name for row in rows} == KERNELS[name]
    assert all(row.work.logits >= layer.useful() * row.queries and row.estimate_us() > 0 for row in rows)
