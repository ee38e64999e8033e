"""ImageNet-1k at 224 with the augmentation of DeiT: RandAugment, erasing, mixup and cutmix.

The published commands pass this RandAugment string. It can request a posterization to 0 bits, which gives a black image
here, as in the releases of Pillow that the published runs used; Pillow 13 refuses it. The commands also pass color
jitter 0.4, which timm skips with RandAugment.
"""

data = dict(
    source="folder",
    img_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    train_interpolation="random",
    crop_pct=0.875,
    workers=8,
)
augment = dict(
    randaugment="rand-m9-mstd0.5-inc1",
    hflip=0.5,
    scale=(0.08, 1.0),
    erasing=0.25,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
)
batch_size = 128
