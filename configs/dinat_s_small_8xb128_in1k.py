"""DiNAT_s-Small on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train dinat_s_small_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      49.6 M parameters, 8.7 GMACs
Published  83.5 top-1 (Hassani, Shi 2022, arXiv:2209.15001)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.nat_300e import *

model = dict(name="dinat_s_small", drop_path_rate=0.3)
