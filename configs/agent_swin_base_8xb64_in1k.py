"""Agent-Swin-B on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train agent_swin_base_8xb64_in1k --data IMAGENET \
           --launcher pytorch
Model      88.1 M parameters, 15.4 GMACs
Published  84.0 top-1 (Han et al. 2023, arXiv:2312.08874; official repository)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.agent_300e import *

model = dict(name="agent_swin_base", drop_path_rate=0.5)
optimizer.update(lr=0.0005)
schedule.update(warmup_lr=5e-7, min_lr=5e-6)
batch_size = 64
global_batch = 512
