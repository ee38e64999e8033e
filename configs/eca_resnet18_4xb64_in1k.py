"""ECA-Net18 on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 4 foveate train eca_resnet18_4xb64_in1k --data IMAGENET \
           --launcher pytorch
Model      11.7 M parameters, 1.8 GMACs
Published  70.92 top-1 (Wang et al. 2020, arXiv:1910.03151; official repository)
Ours       -
Differs    -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.eca_resnet_100e import *

model = dict(name="eca_resnet18")
