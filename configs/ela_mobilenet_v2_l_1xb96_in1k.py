"""ELA-L in MobileNetV2 on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 1 foveate train ela_mobilenet_v2_l_1xb96_in1k --data IMAGENET \
           --launcher pytorch
Model      3.9 M parameters, 0.31 GMACs
Published  - (Xu and Wan 2024, arXiv:2403.01123, whose recipe is not known to us)
Ours       -
Differs    no recipe is published; this is ECA-Net's for MobileNetV2, see the base.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.eca_mobilenet_v2_400e import *

model = dict(name="ela_mobilenet_v2_l")
