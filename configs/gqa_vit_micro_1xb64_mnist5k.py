"""A grouped-query ViT of four blocks on mnist5k: 16 tokens, 4 query heads, 2 key heads.

Command    foveate train gqa_vit_micro_1xb64_mnist5k
Model      0.19 M parameters, 0.0033 GMACs
Published  -
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="gqa_vit_tiny",
    num_classes=10,
    in_chans=1,
    img_size=28,
    patch_size=7,
    embed_dim=64,
    depth=4,
    num_heads=4,
    kv_heads=2,
    global_pool="avg",
)
optimizer.update(lr=2e-3)
