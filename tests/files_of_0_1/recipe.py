"""Fine-tune what is left of a small BiFormer."""

from mmengine.config import read_base

from foveate.pruning.hook import KeepMasks

with read_base():
    from .base import *

model = {'name': 'biformer_tiny', 'num_classes': 2, 'dims': [8, 16], 'depths': [1, 1], 'topks': [2, None], 'head_dim': 8, 'regions': 2, 'mlp_ratio': 1.0}
data = dict(root="images", img_size=32, workers=0)
optimizer = dict(lr=1e-3, weight_decay=0.05)
schedule = dict(epochs=1)
batch_size = 2
ema = 0.5
hooks = [dict(type=KeepMasks, plan="plan.json")]
