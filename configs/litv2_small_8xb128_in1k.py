"""LITv2-S on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train litv2_small_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      27.8 M parameters, 3.6 GMACs
Published  82.0 top-1 (Pan et al. 2022, arXiv:2205.13213)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.litv2_300e import *

model = dict(name="litv2_small", drop_path_rate=0.2)
