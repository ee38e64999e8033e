"""ECA-Net on MobileNetV2: 400 epochs of SGD, rate times 0.98 after each epoch, batch 96, float32, crop and flip.

As in the official script (light_main.py), weight decay applies to every parameter.
Differs: the classifier starts from timm's uniform distribution of +-1/sqrt(classes), the authors' from N(0, 0.01); the
first loss is higher.
"""

from mmengine.config import read_base

with read_base():
    from .eca_resnet_100e import *

optimizer = dict(opt="momentum", lr=0.045, weight_decay=4e-5, momentum=0.9, also_decay=("*",))
schedule = dict(kind="step", epochs=400, step_epochs=1, step_rate=0.98)
batch_size = 96
global_batch = 96
