"""Agent-DeiT-T on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train agent_deit_tiny_8xb512_in1k --data IMAGENET \
           --launcher pytorch
Model      6.0 M parameters, 1.17 GMACs
Published  74.9 top-1 (Han et al. 2023, arXiv:2312.08874; official repository)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.agent_300e import *

model = dict(name="agent_deit_tiny", drop_path_rate=0.0)
optimizer.update(lr=0.004)
schedule.update(warmup_lr=4e-6, min_lr=4e-5)
batch_size = 512
global_batch = 4096
