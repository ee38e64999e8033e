"""A NAT of two stages on mnist5k: 8x8 and 4x4 tokens, 3x3 neighborhoods.

Command    foveate train nat_micro_1xb64_mnist5k
Published  -, not a published model
Ours       -
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="nat_mini",
    num_classes=10,
    in_chans=1,
    drop_path_rate=0.05,
    dims=(32, 64),
    depths=(2, 2),
    head_dim=16,
    kernel_size=3,
)
