"""ECA-Net50 on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 4 foveate train eca_resnet50_4xb64_in1k --data IMAGENET \
           --launcher pytorch
Model      25.6 M parameters, 4.1 GMACs
Published  77.42 top-1 (Wang et al. 2020, arXiv:1910.03151; official repository)
Ours       -
Differs    -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.eca_resnet_100e import *

model = dict(name="eca_resnet50")
