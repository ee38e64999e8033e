"""ELA-B in ResNet-18 on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train ela_resnet18_b_8xb32_in1k --data IMAGENET \
           --launcher pytorch
Published  - (Xu and Wan 2024, arXiv:2403.01123, whose recipe is not known to us)
Ours       -
Differs    no recipe is published; this is ECA-Net's for ResNets, see the base.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.eca_resnet_100e import *

model = dict(name="ela_resnet18_b")
