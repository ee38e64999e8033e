"""ECA-Net34 on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 4 foveate train eca_resnet34_4xb64_in1k --data IMAGENET \
           --launcher pytorch
Model      21.8 M parameters, 3.7 GMACs
Published  74.21 top-1 (Wang et al. 2020, arXiv:1910.03151; official repository)
Ours       -
Differs    -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.eca_resnet_100e import *

model = dict(name="eca_resnet34")
