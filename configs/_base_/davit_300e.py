"""DaViT: 300 epochs and 10 at the lowest rate, global batch 1024, float16 (the scripts' --amp).

The values are those of the published command line, which names the tiny model, and the defaults of the official
script. Drop path of the small and the base model is second-hand: 0.2 and 0.4, as in OpenMMLab's configs
(mmpretrain/configs/_base_/models/davit); the script's default is 0.1.
"""

from mmengine.config import read_base

with read_base():
    from .imagenet_1k import *

data.update(train_interpolation="bicubic", crop_pct=0.9)
optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.05, eps=1e-8, clip_grad=1.0)
schedule = dict(kind="cosine", epochs=300, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=10)
global_batch = 1024
precision = "fp16"
