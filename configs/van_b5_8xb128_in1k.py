"""VAN-B5 on ImageNet-1k at 224, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train van_b5_8xb128_in1k --data IMAGENET \
           --launcher pytorch
Model      90.0 M parameters, 17.1 GMACs
Published  - (Guo et al. 2023, arXiv:2202.09741: with ImageNet-22k pre-training only)
Ours       -
Differs    Drop path is that of OpenMMLab's config; the official
           script ends at B3.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.van_300e import *

model = dict(name="van_b5", drop_path_rate=0.2)
