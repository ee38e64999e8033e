"""ECA-MobileNetV2 on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 1 foveate train eca_mobilenet_v2_1xb96_in1k --data IMAGENET \
           --launcher pytorch
Model      3.5 M parameters, 0.3 GMACs
Published  72.56 top-1 (Wang et al. 2020, arXiv:1910.03151; official repository)
Ours       -
Differs    initial weights of the classifier, see the base.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.eca_mobilenet_v2_400e import *

model = dict(name="eca_mobilenet_v2", drop_rate=0.25)
