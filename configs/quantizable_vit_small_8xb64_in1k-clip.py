"""Quantizable ViT-S/16 on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train quantizable_vit_small_8xb64_in1k-clip \
           --data IMAGENET --launcher pytorch
Model      22.1 M parameters, 4.6 GMACs
Published  80.24 top-1, W8A8 78.71 (Bondarenko et al. 2023, arXiv:2306.12929)
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.quantizable_vit_300e import *

model = dict(name="quantizable_vit_small", softmax_clip=(-0.003, 1.0))
global_batch = 512
