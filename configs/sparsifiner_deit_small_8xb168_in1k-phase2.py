"""Sparsifiner on DeiT-S, phase 2 of 2 on ImageNet-1k at 224: all but the predictors, with DeiT-S as teacher.

Command    torchrun --no-python --nproc-per-node 8 foveate train sparsifiner_deit_small_8xb168_in1k-phase2 \
           --data IMAGENET --launcher pytorch
Model      22.3 M parameters, 4.51 GMACs
Published  - (Wei et al. 2023, arXiv:2303.13755: at most 0.4 below DeiT-S)
Ours       -
Differs    nothing that is known, but for the decay of the averages, which is DeiT's
"""

from mmengine.config import read_base

with read_base():
    from ._base_.sparsifiner import *

model = dict(
    name="sparsifiner_deit_small",
    checkpoint="work_dirs/sparsifiner_deit_small_8xb168_in1k-phase1/best.pth",
)
distill = dict(teacher="deit_small_patch16_224", pretrained=True, phase=2)
optimizer.update(lr=8e-5)
schedule.update(epochs=45, min_lr=2e-6)
ema = 0.99996
