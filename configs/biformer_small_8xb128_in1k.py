"""BiFormer-S on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train biformer_small_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      25.5 M parameters, 4.5 GMACs
Published  83.8 top-1 (Zhu et al. 2023, arXiv:2303.08810)
Ours       -
Differs    The official script shows two nodes (2048 images).
"""

from mmengine.config import read_base

with read_base():
    from ._base_.biformer_300e import *

model = dict(name="biformer_small", drop_path_rate=0.15)
