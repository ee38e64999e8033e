"""Sparsifiner on DeiT-T, phase 2 of 2 on ImageNet-1k at 224: all but the predictors, with DeiT-T as teacher.

Command    torchrun --no-python --nproc-per-node 8 foveate train sparsifiner_deit_tiny_8xb168_in1k-phase2 \
           --data IMAGENET --launcher pytorch
Model      5.9 M parameters, 1.21 GMACs
Published  -
Ours       -
Differs    the authors train DeiT-S; the decay of the averages is DeiT's
"""

from mmengine.config import read_base

with read_base():
    from ._base_.sparsifiner import *

model = dict(
    name="sparsifiner_deit_tiny",
    checkpoint="work_dirs/sparsifiner_deit_tiny_8xb168_in1k-phase1/best.pth",
)
distill = dict(teacher="deit_tiny_patch16_224", pretrained=True, phase=2)
optimizer.update(lr=8e-5)
schedule.update(epochs=45, min_lr=2e-6)
ema = 0.99996
