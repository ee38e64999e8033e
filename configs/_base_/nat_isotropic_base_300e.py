"""The isotropic models of base size: 50 epochs of warm-up, and weights averaged with decay 0.9998."""

from mmengine.config import read_base

with read_base():
    from .nat_300e import *

schedule.update(warmup_epochs=50)
ema = 0.9998
