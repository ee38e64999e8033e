"""Key-driven grouped-query ViT-Base from a multi-head ViT (your own file of timm's vit_base_patch16_224), on CIFAR-10.

Command    foveate train gqa_vit_base_1xb32_cifar10-uptrain --data CIFAR --cfg-options model.checkpoint=WEIGHTS
Model      78.7 M parameters, 16.2 GMACs
Published  - (Khan et al. 2024, arXiv:2408.08454; settings of the official script)
Ours       -
Differs    images are grouped one by one; `model.per_batch=True` groups a batch by its sum, as the authors do. The final
           norm of the multi-head ViT is kept.
"""

data = dict(
    source="torch/cifar10",
    img_size=224,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    crop_pct=1.0,
)
model = dict(
    name="gqa_vit_base",
    num_classes=10,
    kv_heads=6,
    allocation="key_norm",
    checkpoint="vit_base_patch16_224.safetensors",
)
optimizer = dict(opt="adamw", lr=1e-5)
schedule = dict(kind="step", epochs=5, step_epochs=5, step_rate=0.5)  # no step inside the run
batch_size = 32
global_batch = 32
