"""Mask R-CNN on COCO with NAT-Mini, for mmdet 3.x (not run: it needs a compiled mmcv).

Command    python tools/train.py mask-rcnn_nat-mini_fpn_3x_coco.py
Published  -
"""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["foveate.backbones.openmmlab"])
model = dict(
    backbone=dict(
        _delete_=True, type="FoveateBackbone", name="nat_mini", pretrained=True, drop_path_rate=0.1, norm_eval=False
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(rpb=dict(decay_mult=0.0))),
)
max_epochs = 36
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
