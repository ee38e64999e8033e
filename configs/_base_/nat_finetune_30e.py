"""Fine-tune a Large model from ImageNet-22k weights: 30 epochs at a constant rate, global batch 512, float32.

Published: rate, epochs, batch, weight decay, schedule "linear", no mixing. The official script knows no schedule of
that name and leaves the rate constant (by reading of the code). The 22k weights are not part of this package.
"""

from mmengine.config import read_base

with read_base():
    from .nat_300e import *

augment.update(mixup=0.0, cutmix=0.0)
optimizer.update(lr=5e-5, weight_decay=1e-4)
schedule = dict(kind="constant", epochs=30)
batch_size = 64
global_batch = 512
precision = "fp32"
