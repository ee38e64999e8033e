"""Fine-tune a Swin-B that DIMAP pruned; pruned weights stay zero.

Command    torchrun --no-python --nproc-per-node 8 foveate train swin_base_patch4_window7_224_8xb128_in1k-dimap \
           --data IMAGENET --launcher pytorch
Model      87.8 M parameters, 15.4 GMACs
Published  83.52, 83.43, 83.28 top-1 with 15, 35, 55 % of the weights removed (arXiv:2404.13648, table 1)
Ours       -
Differs    Drop path is that of Swin's training: the paper gives no value.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.dimap_finetune_30e import *

model = dict(name="swin_base_patch4_window7_224", checkpoint="pruned/model.safetensors", drop_path_rate=0.5)
