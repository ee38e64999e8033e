"""HaloNet-26-T on ImageNet-1k at 256, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train fv_halonet26t_8xb256_in1k --data IMAGENET \
           --launcher pytorch
Model      12.5 M parameters, 3.2 GMACs
Published  79.1 top-1 at crop 0.95 (timm's results for halonet26t.a1h_in1k)
Ours       -
Differs    the numbers of a1h are not published, see the base.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.halonet_600e import *

model = dict(name="fv_halonet26t", drop_path_rate=0.05)
