"""Agent-CSwin-B on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train agent_cswin_base_8xb64_in1k --data IMAGENET \
           --launcher pytorch
Model      73.2 M parameters, 14.9 GMACs
Published  84.7 top-1 (Han et al. 2023, arXiv:2312.08874; official repository)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.agent_300e import *

model = dict(name="agent_cswin_base", drop_path_rate=0.5)
optimizer.update(lr=0.0005, clip_grad=None, weight_decay=0.1)
schedule.update(cooldown_epochs=10, warmup_lr=5e-7, min_lr=5e-6)
batch_size = 64
ema = 0.99992
global_batch = 512
