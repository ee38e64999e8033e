"""VAN: 300 epochs and 10 at the lowest rate, global batch 1024, float32, inputs scaled to -1..1.

The rate changes once an epoch, as in the official script (timm 0.4.12).
"""

from mmengine.config import read_base

with read_base():
    from .imagenet_1k import *

data.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.9)
optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.05)
schedule = dict(kind="cosine", epochs=300, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-6, cooldown_epochs=10)
schedule.update(per="epoch")
global_batch = 1024
