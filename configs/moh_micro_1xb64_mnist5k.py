"""A MoH-ViT of two stages on mnist5k: 7x7 tokens with aggregated attention, 4x4 with plain attention.

Command    foveate train moh_micro_1xb64_mnist5k
Model      0.28 M parameters, 0.0072 GMACs
Published  -
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="moh_transnext_small_75",
    num_classes=10,
    in_chans=1,
    dims=(48, 96),
    depths=(1, 2),
    heads=(4, 8),
    shared=(2, 2),
    routed=(1, 3),
    mlp_ratios=(3, 3),
    sr_ratios=(2, 1),
)
loss = dict(load_balance=0.01)
