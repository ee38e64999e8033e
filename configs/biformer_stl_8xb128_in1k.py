"""BiFormer-STL on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train biformer_stl_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      28.4 M parameters, 4.6 GMACs
Published  82.7 top-1 (Zhu et al. 2023, arXiv:2303.08810)
Ours       -
Differs    nothing that is known
"""

from mmengine.config import read_base

with read_base():
    from ._base_.biformer_300e import *

model = dict(name="biformer_stl", drop_path_rate=0.1)
