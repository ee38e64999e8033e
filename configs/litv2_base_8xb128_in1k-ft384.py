"""LITv2-B at 384, fine-tuned from its weights at 224 (the authors' file or your own).

Command    torchrun --no-python --nproc-per-node 8 foveate train litv2_base_8xb128_in1k-ft384 --data IMAGENET \
           --launcher pytorch --cfg-options model.checkpoint=litv2_b.pth
Model      86.5 M parameters, 38.7 GMACs
Published  84.7 top-1 (Pan et al. 2022, arXiv:2205.13213)
Ours       -
Differs    Validation takes the center crop, the authors resize the whole image to a square.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.litv2_300e import *

model = dict(name="litv2_base", drop_path_rate=0.5, checkpoint="litv2_b.pth")
data.update(img_size=384, crop_pct=1.0)
optimizer.update(lr=4e-5, weight_decay=1e-8)
schedule = dict(kind="cosine", epochs=30, warmup_epochs=5, warmup_lr=4e-8, min_lr=4e-7)
