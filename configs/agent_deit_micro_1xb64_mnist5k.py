"""An Agent-DeiT of four blocks on mnist5k: 7x7 patches of 4 pixels, 9 agents.

Command    foveate train agent_deit_micro_1xb64_mnist5k
Model      0.22 M parameters, 0.0105 GMACs
Published  -
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="agent_deit_tiny",
    num_classes=10,
    in_chans=1,
    img_size=28,
    patch_size=4,
    dim=64,
    depth=4,
    heads=2,
    agent_num=(9, 9, 9, 9),
)
