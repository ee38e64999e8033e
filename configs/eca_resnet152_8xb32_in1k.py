"""ECA-Net152 on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train eca_resnet152_8xb32_in1k --data IMAGENET \
           --launcher pytorch
Published  78.92 top-1 (Wang et al. 2020, arXiv:1910.03151; official repository)
Ours       -
Differs    weight decay, see the base.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.eca_resnet_100e import *

model = dict(name="eca_resnet152")
