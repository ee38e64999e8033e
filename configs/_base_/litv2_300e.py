"""LITv2: 300 epochs with 20 of warm-up, global batch 1024, float16 (the authors used apex O1).

The published rates are for 512 images (5e-4, minimum 5e-6, warm-up from 5e-7) and are scaled by the batch. The
convolutions that compute deformable offsets have 1 % of the rate, which equals the minimum at this batch.
"""

from mmengine.config import read_base

with read_base():
    from .imagenet_1k import *

data.update(train_interpolation="bicubic")
optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8, clip_grad=5.0)
optimizer.update(lr_mult={"*.conv_offset.weight": 0.01})
schedule = dict(kind="cosine", epochs=300, warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5)
global_batch = 1024
precision = "fp16"
