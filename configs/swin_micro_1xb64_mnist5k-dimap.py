"""Fine-tune the micro Swin on mnist5k after DIMAP pruned half of its weights, see benchmarks/pruning_mnist5k.py.

Command    foveate train swin_micro_1xb64_mnist5k-dimap
Model      0.3 M parameters, 0.0071 GMACs
Published  -
Ours       98.2, 98.4, 98.4 top-1 with seeds 0, 1, 2 (dense 98.2, 98.5, 98.1; half of the weights pruned) on a Xeon
Differs    the paper's rates are for ImageNet; here 1/6 of the base training's rate, for 30 epochs.
"""

from mmengine.config import read_base

from foveate.pruning.hook import KeepMasks

with read_base():
    from .swin_micro_1xb64_mnist5k import *

model.update(checkpoint="pruned/model.safetensors")
optimizer.update(lr=3.3e-4)
schedule.update(epochs=30, warmup_epochs=2)
hooks = [dict(type=KeepMasks, plan="pruned/plan.json")]
