"""A Flowformer of two stages on mnist5k: 8x8 and 4x4 tokens.

Command    foveate train flowformer_micro_1xb64_mnist5k
Model      0.21 M parameters, 0.0054 GMACs
Published  -
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

data.update(img_size=32)
schedule.update(epochs=60)  # 96.2 % after 36
model = dict(
    name="flowformer_cv",
    num_classes=10,
    in_chans=1,
    img_size=32,
    dims=(48, 96),
    depths=(2, 2),
    heads=4,
    mlp_ratio=2.0,
    layer_scale=1.0,
)
