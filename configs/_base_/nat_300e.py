"""NAT, DiNAT and isotropic models: 300 epochs and 10 at the lowest rate, global batch 1024, float16 (--amp).

Weight decay applies to relative position biases, as in the authors' runs: their model lists these as exempt under a
name that timm's optimizer factory does not read (by reading of the code).
"""

from mmengine.config import read_base

with read_base():
    from .imagenet_1k import *

optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8, clip_grad=5.0)
optimizer.update(also_decay=("*.rpb",))
schedule = dict(kind="cosine", epochs=300, warmup_epochs=20, warmup_lr=1e-6, min_lr=5e-6, cooldown_epochs=10)
global_batch = 1024
precision = "fp16"
