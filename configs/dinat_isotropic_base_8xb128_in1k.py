"""Isotropic DiNAT Base on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train dinat_isotropic_base_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      86.5 M parameters, 16.9 GMACs
Published  82.1 top-1 (Hassani, Shi 2022, arXiv:2209.15001)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.nat_isotropic_base_300e import *

model = dict(name="dinat_isotropic_base", drop_path_rate=0.4)
