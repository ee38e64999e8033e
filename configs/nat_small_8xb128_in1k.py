"""NAT-Small on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train nat_small_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      50.7 M parameters, 7.8 GMACs
Published  83.7 top-1 (Hassani et al. 2023, arXiv:2204.07143)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.nat_300e import *

model = dict(name="nat_small", drop_path_rate=0.3)
