"""A VAN of two stages on mnist5k: 7x7 and 4x4 maps.

Command    foveate train van_micro_1xb64_mnist5k
Model      0.1 M parameters, 0.0027 GMACs
Published  -
Ours       98.4, 98.4, 98.2 top-1 with seeds 0, 1, 2; 46 to 50 s on 2 threads of a Xeon with AVX-512
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mnist5k import *

model = dict(
    name="van_b0",
    num_classes=10,
    in_chans=1,
    dims=(32, 64),
    depths=(2, 1),
    mlp_ratios=(4, 4),
)
schedule.update(dict(epochs=16))
