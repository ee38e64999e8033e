"""Fine-tune the micro NAT on mnist5k after DIMAP pruned half of its weights, see benchmarks/pruning_mnist5k.py.

Command    foveate train nat_micro_1xb64_mnist5k-dimap
Model      0.2 M parameters, 0.0048 GMACs
Published  -
Ours       97.1, 97.3, 97.0 top-1 with seeds 0, 1, 2 (dense 97.3, 97.8, 97.1; half of the weights pruned) on a Xeon
Differs    the paper's rates are for ImageNet; here 1/6 of the base training's rate, for 12 epochs.
"""

from mmengine.config import read_base

from foveate.pruning.hook import KeepMasks

with read_base():
    from .nat_micro_1xb64_mnist5k import *

model.update(checkpoint="pruned/model.safetensors")
optimizer.update(lr=5e-4)
schedule.update(epochs=12, warmup_epochs=2)
hooks = [dict(type=KeepMasks, plan="pruned/plan.json")]
