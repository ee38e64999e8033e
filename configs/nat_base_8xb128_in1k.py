"""NAT-Base on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train nat_base_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      89.8 M parameters, 13.7 GMACs
Published  84.3 top-1 (Hassani et al. 2023, arXiv:2204.07143)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.nat_300e import *

model = dict(name="nat_base", drop_path_rate=0.5)
