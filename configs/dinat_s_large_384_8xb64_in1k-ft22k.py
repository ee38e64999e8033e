"""DiNAT_s-Large at 384, fine-tuned on ImageNet-1k from ImageNet-22k weights (your own file).

Command    torchrun --no-python --nproc-per-node 8 foveate train dinat_s_large_384_8xb64_in1k-ft22k --data IMAGENET \
           --launcher pytorch --cfg-options model.checkpoint=WEIGHTS
Model      196.5 M parameters, 101.3 GMACs
Published  87.4 top-1 (Hassani, Shi 2022, arXiv:2209.15001)
Ours       -
Differs    the schedule "linear" is constant, see the base.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.nat_finetune_30e import *

model = dict(name="dinat_s_large_384", drop_path_rate=0.35, checkpoint="dinat_s_large_in22k_224.pth")
data.update(img_size=384, crop_pct=1.0)
optimizer.update(weight_decay=1e-5)
