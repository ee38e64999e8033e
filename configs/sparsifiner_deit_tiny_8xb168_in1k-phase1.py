"""Sparsifiner on DeiT-T, phase 1 of 2 on ImageNet-1k at 224: the predictors learn the attention matrices of DeiT-T.

Command    torchrun --no-python --nproc-per-node 8 foveate train sparsifiner_deit_tiny_8xb168_in1k-phase1 \
           --data IMAGENET --launcher pytorch --cfg-options model.checkpoint=DEIT
Model      5.9 M parameters, 1.21 GMACs
Published  -
Ours       -
Differs    DEIT is your own file of timm's deit_tiny_patch16_224, from which the model starts; the teacher is the same
           model. Weights are not averaged: in 5 epochs the authors' average would keep most of the first weights.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.sparsifiner import *

model = dict(name="sparsifiner_deit_tiny", checkpoint="deit_tiny_patch16_224.safetensors")
distill = dict(teacher="deit_tiny_patch16_224", pretrained=True, phase=1)
