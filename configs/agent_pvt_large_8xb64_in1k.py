"""Agent-PVT-L on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train agent_pvt_large_8xb64_in1k --data IMAGENET \
           --launcher pytorch
Model      48.7 M parameters, 10.3 GMACs
Published  83.7 top-1 (Han et al. 2023, arXiv:2312.08874; official repository)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.agent_300e import *

model = dict(name="agent_pvt_large", drop_path_rate=0.3)
optimizer.update(lr=0.0005, clip_grad=1.0)
schedule.update(warmup_epochs=5, cooldown_epochs=10, warmup_lr=5e-7, min_lr=5e-6)
batch_size = 64
global_batch = 512
