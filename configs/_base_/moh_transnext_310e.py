"""MoH-ViT: 300 epochs and 10 at the lowest rate, global batch 1024, repeated augmentation, float16 (the authors' AMP).

The rate is not scaled by the batch. The number of views in repeated augmentation is not published; 3 as in
DeiT.
"""

from mmengine.config import read_base

with read_base():
    from .imagenet_1k import *

augment.update(repeats=3)
optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.05, eps=1e-8, clip_grad=1.0)
schedule = dict(kind="cosine", epochs=300, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=10)
precision = "fp16"
loss = dict(load_balance=0.01)
