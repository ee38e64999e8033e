"""LITv2-M on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train litv2_medium_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      48.8 M parameters, 7.3 GMACs
Published  83.3 top-1 (Pan et al. 2022, arXiv:2205.13213)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.litv2_300e import *

model = dict(name="litv2_medium", drop_path_rate=0.3)
