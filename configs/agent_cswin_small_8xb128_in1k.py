"""Agent-CSwin-S on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train agent_cswin_small_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      32.8 M parameters, 6.7 GMACs
Published  83.9 top-1 (Han et al. 2023, arXiv:2312.08874; official repository)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.agent_300e import *

model = dict(name="agent_cswin_small", drop_path_rate=0.4)
optimizer.update(clip_grad=None)
schedule.update(cooldown_epochs=10)
ema = 0.99984
global_batch = 1024
