"""HaloNet-50-TS on ImageNet-1k at 256, from scratch.

Command    torchrun --no-python --nproc-per-node 8 foveate train fv_halonet50ts_8xb256_in1k --data IMAGENET \
           --launcher pytorch
Model      22.7 M parameters, 5.3 GMACs
Published  81.6 top-1 at crop 0.94 (timm's results for halonet50ts.a1h_in1k)
Ours       -
Differs    the numbers of a1h are not published, see the base.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.halonet_600e import *

data.update(crop_pct=0.94)
model = dict(name="fv_halonet50ts", drop_path_rate=0.05)
