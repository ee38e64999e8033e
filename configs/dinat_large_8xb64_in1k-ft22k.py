"""DiNAT-Large at 224, fine-tuned on ImageNet-1k from ImageNet-22k weights (your own file).

Command    torchrun --no-python --nproc-per-node 8 foveate train dinat_large_8xb64_in1k-ft22k --data IMAGENET \
           --launcher pytorch --cfg-options model.checkpoint=WEIGHTS
Model      200.9 M parameters, 30.5 GMACs
Published  86.6 top-1 (Hassani, Shi 2022, arXiv:2209.15001)
Ours       -
Differs    the schedule "linear" is constant, see the base.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.nat_finetune_30e import *

model = dict(name="dinat_large", drop_path_rate=0.35, checkpoint="dinat_large_in22k_224.pth")
