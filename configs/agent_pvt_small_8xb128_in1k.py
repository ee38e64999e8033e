"""Agent-PVT-S on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train agent_pvt_small_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      20.6 M parameters, 4.0 GMACs
Published  82.2 top-1 (Han et al. 2023, arXiv:2312.08874; official repository)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.agent_300e import *

model = dict(name="agent_pvt_small", drop_path_rate=0.1)
optimizer.update(clip_grad=None)
schedule.update(warmup_epochs=5, cooldown_epochs=10)
global_batch = 1024
