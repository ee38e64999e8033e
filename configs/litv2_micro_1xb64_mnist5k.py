"""A LITv2 of two stages on mnist5k: 7x7 and 4x4 tokens, HiLo attention in windows of 2x2.

Command    foveate train litv2_micro_1xb64_mnist5k
Model      0.1 M parameters, 0.0016 GMACs
Published  -
Ours       98.3 top-1 (best epoch) with seed 0; 422 s on one thread of a busy 2-core machine
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="litv2_small",
    num_classes=10,
    in_chans=1,
    dims=(32, 64),
    depths=(2, 2),
    windows=(2, 2),
    alpha=0.5,
    head_dim=8,
    mlp_ratio=2.0,
)
schedule.update(epochs=24)
