"""BiFormer-B on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train biformer_base_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      56.8 M parameters, 9.8 GMACs
Published  84.3 top-1 (Zhu et al. 2023, arXiv:2303.08810)
Ours       -
Differs    Drop path is assumed: the official code has none for B.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.biformer_300e import *

model = dict(name="biformer_base", drop_path_rate=0.4)
