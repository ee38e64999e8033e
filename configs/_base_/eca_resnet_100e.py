"""ECA-Net on ResNets: 100 epochs of SGD, rate times 0.1 every 30, global batch 256, float32, crop and flip.

Differs from the official script, which applies weight decay to every parameter: here biases and norms have none. The
number of devices, which determines the batch of BatchNorm's statistics, is not published.
"""

from mmengine.config import read_base

with read_base():
    from .imagenet_1k import *

data.update(interpolation="bilinear", train_interpolation="bilinear")
augment = dict(hflip=0.5, scale=(0.08, 1.0))
optimizer = dict(opt="momentum", lr=0.1, weight_decay=1e-4, momentum=0.9)
schedule = dict(kind="step", epochs=100, step_epochs=30, step_rate=0.1)
batch_size = 32
