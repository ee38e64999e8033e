"""ELA-B in ResNet-18 on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 4 foveate train ela_resnet18_b_4xb64_in1k --data IMAGENET \
           --launcher pytorch
Model      11.7 M parameters, 1.8 GMACs
Published  - (Xu and Wan 2024, arXiv:2403.01123, whose recipe is not known to us)
Ours       -
Differs    no recipe is published; this is ECA-Net's for ResNets, see the base.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.eca_resnet_100e import *

model = dict(name="ela_resnet18_b")
