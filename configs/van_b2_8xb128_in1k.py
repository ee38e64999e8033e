"""VAN-B2 on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train van_b2_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      26.6 M parameters, 5.0 GMACs
Published  82.8 top-1 (Guo et al. 2023, arXiv:2202.09741)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.van_300e import *

model = dict(name="van_b2", drop_path_rate=0.1)
