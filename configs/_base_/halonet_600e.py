"""timm's HaloNets (its tag a1h): 600 epochs of LAMB at 256 px, global batch 2048, after "ResNet strikes back" A1.

Published for a1h: it is based on A1 (Wightman, Touvron, Jegou 2021, arXiv:2110.00476), with LAMB, a cosine schedule and
warm-up, and with stronger dropout, stochastic depth and RandAugment, whose values are not published. The values here
are those of A1, checked against OpenMMLab's implementation of A1: rate, decay, warm-up, RandAugment 7 with deviation
0.5, mixup, cutmix, smoothing, repeated augmentation of 3, stochastic depth 0.05. The initial rate of the warm-up is
assumed. The paper's H0 to H7 were trained differently and have no recipe here.
As in A1, the loss is binary cross-entropy. Differs from A1: 256 pixels.
"""

from mmengine.config import read_base

with read_base():
    from .imagenet_1k import *

data.update(img_size=256, train_interpolation="bicubic", crop_pct=0.95)
augment = dict(
    randaugment="rand-m7-mstd0.5-inc1",
    hflip=0.5,
    scale=(0.08, 1.0),
    mixup=0.2,
    cutmix=1.0,
    smoothing=0.1,
    repeats=3,
)
loss = dict(kind="bce")
optimizer = dict(opt="lamb", lr=5e-3, weight_decay=0.01)
schedule = dict(kind="cosine", epochs=600, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-6)
batch_size = 256
global_batch = 2048
precision = "fp16"
