"""Sparsifiner on DeiT: AdamW with weight decay 0.05, global batch 1344, DeiT's augmentation, no drop path.

Whether the authors repeat augmentation, as DeiT's script does, is not known: it is off. Rates are as published, not
scaled by the batch; the first rate of the warm-up is DeiT's.
"""

from mmengine.config import read_base

with read_base():
    from .imagenet_1k import *

data.update(train_interpolation="bicubic")
optimizer = dict(opt="adamw", lr=3e-4, weight_decay=0.05)
schedule = dict(kind="cosine", epochs=5, warmup_epochs=3, warmup_lr=1e-6, min_lr=2e-4)
batch_size = 168
global_batch = 1344
