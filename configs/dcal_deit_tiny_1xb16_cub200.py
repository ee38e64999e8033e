"""DCAL around DeiT-Tiny on CUB-200-2011 (class folders train/ and validation/), 448 px, from ImageNet weights.

Command    foveate train dcal_deit_tiny_1xb16_cub200 --data CUB
Model      6.2 M parameters, 8.9 GMACs
Published  84.6 top-1 (Zhu et al. 2022, arXiv:2205.02151)
Ours       -
Differs    pairs are drawn inside the batch. The rate of stochastic depth is not published: 0.1.
"""

data = dict(source="folder", img_size=448, crop_pct=0.815)  # a crop of 448 from 550
model = dict(
    name="dcal",
    of="deit_tiny_patch16_224",
    num_classes=200,
    img_size=448,
    local_share=0.1,
    pretrained=True,
    drop_path_rate=0.1,
)
augment = dict(hflip=0.5, scale=(0.3, 1.0))
optimizer = dict(opt="adam", lr=1.5625e-5, weight_decay=0.05)  # 5e-4 / 512 * 16
schedule = dict(kind="cosine", epochs=100)
batch_size = 16
loss = dict(branches=True)
global_batch = 16
