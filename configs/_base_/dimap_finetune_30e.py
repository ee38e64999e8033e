"""Fine-tune after one-shot DIMAP pruning (arXiv:2404.13648): 30 epochs, 15 of them warm-up, at a low learning rate.

Augmentation is Swin's, as in the paper. The batch size of fine-tuning is not published; 1024 as in the base training.
Before the run: `foveate prune MODEL --pretrained --method dimap --ratio 0.5 -o pruned`.
"""

from mmengine.config import read_base

from foveate.pruning.hook import KeepMasks

with read_base():
    from .imagenet_1k import *

data.update(crop_pct=0.9)
optimizer = dict(opt="adamw", lr=2e-5, weight_decay=1e-8, clip_grad=5.0)
schedule = dict(kind="cosine", epochs=30, warmup_epochs=15, warmup_lr=2e-8, min_lr=2e-7)
global_batch = 1024
hooks = [dict(type=KeepMasks, plan="pruned/plan.json")]
