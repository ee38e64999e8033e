"""An Agent-PVT of two stages on mnist5k: 7x7 and 4x4 maps, 9 and 4 agents.

Command    foveate train agent_pvt_micro_1xb64_mnist5k
Model      0.24 M parameters, 0.0031 GMACs
Published  -
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="agent_pvt_tiny",
    num_classes=10,
    in_chans=1,
    img_size=28,
    dims=(48, 96),
    depths=(1, 2),
    heads=(2, 4),
    agent_num=(9, 4),
    mlp_ratios=(3, 3),
    attn_type="AA",
    agent_sr_ratios="11",
    sr_ratios="11",
)
