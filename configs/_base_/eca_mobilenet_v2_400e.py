"""ECA-Net on MobileNetV2: 400 epochs of SGD, rate times 0.98 after each epoch, batch 96, float32, crop and flip.

Differs from the official script, which applies weight decay to every parameter: here biases and norms have none.
Momentum is that of the ResNets' script.
"""

from mmengine.config import read_base

with read_base():
    from .eca_resnet_100e import *

optimizer = dict(opt="momentum", lr=0.045, weight_decay=4e-5, momentum=0.9)
schedule = dict(kind="step", epochs=400, step_epochs=1, step_rate=0.98)
batch_size = 96
