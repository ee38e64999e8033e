"""Flowformer for vision on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 6 foveate train flowformer_cv_6xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      43.3 M parameters, 6.9 GMACs
Published  80.6 top-1 (Wu et al. 2022, arXiv:2202.06258)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.flowformer_300e import *

model = dict(name="flowformer_cv", drop_path_rate=0.1)
global_batch = 768
