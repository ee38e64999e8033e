"""A short MobileNetV1 with subspace attention on mnist5k: a gate behind layer 4, another in place of layer 6.

Command    foveate train ulsam_micro_1xb64_mnist5k
Model      0.73 M parameters, 0.0026 GMACs
Published  -
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="ulsam_mobilenetv1",
    num_classes=10,
    in_chans=1,
    depths=(1, 1, 1, 2, 1),
    insert=(4,),
    replace=(6,),
)
schedule.update(dict(epochs=16))
