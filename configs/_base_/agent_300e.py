"""Agent Attention: 300 epochs with 20 of warm-up, global batch 1024, float16 (the scripts' mixed precision).

The published rates are for 512 images (5e-4) and are scaled by the batch. The initial rate of the warm-up and the final
rate, 5e-7 and 5e-6 for 512 images, are those of the Swin scripts that the authors' are made from.
"""

from mmengine.config import read_base

with read_base():
    from .imagenet_1k import *

data.update(train_interpolation="bicubic")
optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8, clip_grad=5.0)
schedule = dict(kind="cosine", epochs=300, warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5)
precision = "fp16"
