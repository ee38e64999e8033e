"""DaViT-Tiny on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train fv_davit_tiny_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      28.4 M parameters, 4.5 GMACs
Published  82.8 top-1 (Ding et al. 2022, arXiv:2204.03645; official repository)
Ours       -
Differs    Drop path grows from pair to pair of blocks, as in
           timm, where the official code lets it grow from block to block.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.davit_300e import *

model = dict(name="fv_davit_tiny", drop_path_rate=0.1)
