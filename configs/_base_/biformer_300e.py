"""BiFormer: 300 epochs, global batch 1024, float16 (the scripts' --amp), repeated augmentation, averaged weights.

The published rate is 5e-4 per 512 images of the global batch. It changes once an epoch, and one epoch late: the
official script sets the rate after each epoch with the number of that epoch, so the first two have the warm-up's first
rate. Repeated augmentation shows 3 views of an image, as the official sampler does. The authors' accuracy is for the
raw weights.
"""

from mmengine.config import read_base

with read_base():
    from .imagenet_1k import *

data.update(train_interpolation="bicubic")
augment.update(repeats=3)
optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.05, eps=1e-8)
schedule = dict(kind="cosine", epochs=300, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, per="epoch", delay_epochs=1)
global_batch = 1024
precision = "fp16"
ema = 0.99996
