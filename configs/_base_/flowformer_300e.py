"""Flowformer: 300 epochs, 5e-4 for each 512 images of the global batch, float16, no random erasing.

The authors' script trains on 6 GPUs with 128 images each. The rate here is for their 768 images. The lowest rate and
the rate at which warm-up begins are not published; they are DeiT's.
"""

from mmengine.config import read_base

with read_base():
    from .imagenet_1k import *

augment.update(erasing=0.0)
optimizer = dict(opt="adamw", lr=7.5e-4, weight_decay=0.05, eps=1e-8, clip_grad=1.0)
schedule = dict(kind="cosine", epochs=300, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5)
precision = "fp16"
