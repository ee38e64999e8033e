"""An Agent-CSwin of two stages on mnist5k: 7x7 and 4x4 maps, 9 and 4 agents.

Command    foveate train agent_cswin_micro_1xb64_mnist5k
Model      0.31 M parameters, 0.0059 GMACs
Published  -
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="agent_cswin_tiny",
    num_classes=10,
    in_chans=1,
    img_size=28,
    dims=(48, 96),
    depths=(1, 2),
    heads=(2, 4),
    agent_num=(9, 4),
    attn_type="AA",
    la_split_size="74",
    split_size="11",
)
