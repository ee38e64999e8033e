"""Quantizable ViTs: 300 epochs of AdamW, global batch 512, cosine to 1e-5, random augmentation with mixes.

The paper prints both "cosine" and a factor of 0.1 every 30 epochs down to 1e-5; here it is the cosine.
"""

from mmengine.config import read_base

with read_base():
    from .imagenet_1k import *

optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.03)
schedule = dict(kind="cosine", epochs=300, warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5)
batch_size = 64
