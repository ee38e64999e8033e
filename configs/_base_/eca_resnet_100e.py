"""ECA-Net on ResNets: 100 epochs of SGD, rate times 0.1 every 30, global batch 256, float32, crop and flip.

As in the official script (main.py), weight decay applies to every parameter. The README's example runs on 4 devices,
64 images each, which is the batch of BatchNorm's statistics.
"""

from mmengine.config import read_base

with read_base():
    from .imagenet_1k import *

data.update(interpolation="bilinear", train_interpolation="bilinear")
augment = dict(hflip=0.5, scale=(0.08, 1.0))
optimizer = dict(opt="momentum", lr=0.1, weight_decay=1e-4, momentum=0.9, also_decay=("*",))
schedule = dict(kind="step", epochs=100, step_epochs=30, step_rate=0.1)
batch_size = 64
global_batch = 256
