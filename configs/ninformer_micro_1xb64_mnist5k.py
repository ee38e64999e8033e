"""A NiNformer of three blocks on mnist5k: 49 patches of 4x4 px.

Command    foveate train ninformer_micro_1xb64_mnist5k
Model      0.15 M parameters, 0.008 GMACs
Published  -
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="ninformer",
    num_classes=10,
    in_chans=1,
    img_size=28,
    dims=(64, 64, 64),
    depths=(1, 1, 1),
    hidden_dim=128,
)
optimizer.update(lr=1e-3)
