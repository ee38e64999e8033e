"""MoH-ViT-S with 80 % of its heads on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train moh_transnext_small_80_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      49.9 M parameters, 10.3 GMACs
Published  84.7 top-1 (Jin et al. 2024, arXiv:2410.11842)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.moh_transnext_310e import *

model = dict(name="moh_transnext_small_80", drop_path_rate=0.45)
global_batch = 1024
