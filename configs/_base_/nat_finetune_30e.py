"""Fine-tune a Large model from ImageNet-22k weights: 30 epochs, linear decay, global batch 512, float32.

Published: rate, epochs, batch, weight decay, "linear", no mixing. Not published: the final rate (here the minimum of
the script's defaults), and the meaning of "linear", which the script does not implement. The 22k weights are not part
of this package.
"""

from mmengine.config import read_base

with read_base():
    from .nat_300e import *

augment.update(mixup=0.0, cutmix=0.0)
optimizer.update(lr=5e-5, weight_decay=1e-4)
schedule = dict(kind="linear", epochs=30, min_lr=5e-6)
batch_size = 64
precision = "fp32"
