"""A ViT of four blocks and 7x7 tokens on mnist5k; `mixer` in a copy takes another token mixer.

Command    foveate train mixer_vit_micro_1xb64_mnist5k
Model      0.14 M parameters, 0.007 GMACs
Published  -
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="mixer_vit_tiny",
    num_classes=10,
    in_chans=1,
    img_size=28,
    patch_size=4,
    dims=(64,) * 4,
    depths=(1,) * 4,
    heads=4,
    mlp_ratio=2.0,
    mixer="circle",
    radius=3,
)
