"""VAN-B4 on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train van_b4_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      60.3 M parameters, 12.1 GMACs
Published  84.1 top-1 (OpenMMLab's evaluation of the authors' weights; Guo et al. 2023, arXiv:2202.09741)
Ours       -
Differs    Drop path is that of OpenMMLab's config; the official
           script ends at B3.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.van_300e import *

model = dict(name="van_b4", drop_path_rate=0.2)
