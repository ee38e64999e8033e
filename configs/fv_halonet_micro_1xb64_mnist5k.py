"""A HaloNet of one block a stage on mnist5k: blocks of 4x4 tokens with a halo of 1.

Command    foveate train fv_halonet_micro_1xb64_mnist5k
Model      1.4 M parameters, 0.01 GMACs
Published  -
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="fv_halonet_h0",
    num_classes=10,
    in_chans=1,
    depths=(1, 1, 1, 1),
    block_size=4,
    halo=1,
)
schedule.update(epochs=12)
