"""A ViT with relative position biases on mnist5k: 7x7 tokens, 6 blocks.

Command    foveate train vitrpb_micro_1xb64_mnist5k
Model      0.2 M parameters, 0.0115 GMACs
Published  -
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="vitrpb_small",
    num_classes=10,
    in_chans=1,
    dims=(64,) * 6,
    depths=(1,) * 6,
    head_dim=16,
    patch_size=4,
    kernel_size=7,
    mlp_ratio=2.0,
)
schedule.update(epochs=50)
