"""DaViT-Small on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train fv_davit_small_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      49.7 M parameters, 8.8 GMACs
Published  84.2 top-1 (Ding et al. 2022, arXiv:2204.03645; official repository)
Ours       -
Differs    Drop path 0.2 is second-hand, see the base; it grows from pair to
           pair of blocks, as in timm, where the official code lets it grow from block to block.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.davit_300e import *

model = dict(name="fv_davit_small", drop_path_rate=0.2)
