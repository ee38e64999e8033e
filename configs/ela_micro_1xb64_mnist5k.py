"""An ELA-Net of one block a stage on mnist5k.

Command    foveate train ela_micro_1xb64_mnist5k
Model      4.9 M parameters, 0.015 GMACs
Published  -
Ours       99.0 top-1 (best epoch) with seed 0; 381 s on one thread of a busy 2-core machine
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="ela_resnet18_b",
    num_classes=10,
    in_chans=1,
    depths=(1, 1, 1, 1),
)
schedule.update(epochs=8)
