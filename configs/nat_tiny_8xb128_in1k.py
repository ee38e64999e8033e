"""NAT-Tiny on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train nat_tiny_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      27.9 M parameters, 4.3 GMACs
Published  83.2 top-1 (Hassani et al. 2023, arXiv:2204.07143)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.nat_300e import *

model = dict(name="nat_tiny", drop_path_rate=0.2)
