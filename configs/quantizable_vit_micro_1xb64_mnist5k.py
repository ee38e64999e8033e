"""A quantizable ViT of four blocks on mnist5k: 4x4 tokens.

Command    foveate train quantizable_vit_micro_1xb64_mnist5k
Model      0.21 M parameters, 0.0035 GMACs
Published  -
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

schedule.update(epochs=60)
optimizer.update(lr=2e-3)
model = dict(
    name="quantizable_vit_tiny",
    num_classes=10,
    in_chans=1,
    img_size=28,
    patch_size=7,
    embed_dim=64,
    depth=4,
    num_heads=4,
    global_pool="avg",
    softmax_clip=(-0.003, 1.0),
    gate="linear",
)
