"""Agent-DeiT-S on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train agent_deit_small_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      22.6 M parameters, 4.4 GMACs
Published  80.5 top-1 (Han et al. 2023, arXiv:2312.08874; official repository)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.agent_300e import *

model = dict(name="agent_deit_small", drop_path_rate=0.1)
global_batch = 1024
