"""Detection and segmentation: our backbones in torchvision, segmentation-models-pytorch and MMEngine's registry."""

from typing import Any

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from small_models import SMALL
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from foveate import attention_ops as ops
from foveate.backbones.openmmlab import FoveateBackbone

NAT = {"dims": (16, 32), "depths": (1, 1), "head_dim": 8, "kernel_size": 3}
ANY_STAGES = {name: kwargs for name, kwargs in SMALL.items() if name != "fv_davit_base_fl"}

FAST = ("nat_mini", "van_b0", "fv_davit_tiny", "eca_resnet18")
EVERY_FAMILY = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ANY_STAGES]
)


class Pyramid(nn.Module):
    """A timm model's last two maps as torchvision's FPN wants them: a dict of maps with equal channels."""

    out_channels = 16
    body: Any

    def __init__(self, name: str, **kwargs) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(-2, -1), **kwargs)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x):
        return self.fpn({str(i): to_nchw(self.body, m) for i, m in enumerate(self.body(x))})


def to_nchw(body: Any, x: torch.Tensor) -> torch.Tensor:
    channels_last = getattr(body, "output_fmt", "NCHW") == "NHWC" and x.shape[1] not in body.feature_info.channels()
    return x.permute(0, 3, 1, 2) if channels_last else x


def detector(name: str, **kwargs) -> FasterRCNN:
    return FasterRCNN(
        Pyramid(name, **kwargs),
        num_classes=2,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,)), ((1.0,),) * 2),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 5, 2),
    )


def squares(count: int, seed: int):
    """Images with one bright square each, of any size, and its box."""
    generator, pictures, targets = torch.Generator().manual_seed(seed), [], []
    for _ in range(count):
        picture = 0.1 * torch.rand(3, 64, 80, generator=generator)
        top, left = torch.randint(0, 36, (2,), generator=generator).tolist()
        picture[:, top : top + 24, left : left + 24] = 1.0
        pictures.append(picture)
        box = torch.tensor([[left, top, left + 24, top + 24]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.ones(1, dtype=torch.long)})
    return pictures, targets


@EVERY_FAMILY
def test_every_family_is_a_body_of_torchvisions_detectors(name):
    torch.manual_seed(0)
    model = detector(name, **{k: v for k, v in SMALL[name].items() if k != "num_classes"})
    losses = model(*squares(2, 0))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert sum(p.grad is not None for p in model.backbone.body.parameters()) > 5
    found = model.eval()(squares(1, 1)[0])
    assert found[0]["boxes"].shape[1] == 4


@pytest.mark.slow
def test_a_detector_learns_to_find_squares():
    torch.manual_seed(0)
    model = detector("nat_mini", **NAT)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(120):
        losses = model(*squares(4, 1000 + step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    from torchvision.ops import box_iou

    pictures, targets = squares(20, 0)
    with torch.no_grad():
        found = model.eval()(pictures)
    right = [
        len(f["boxes"]) > 0 and box_iou(f["boxes"][:1], t["boxes"]).item() > 0.5
        for f, t in zip(found, targets, strict=True)
    ]
    assert sum(right) >= 16


def unet(name: str, **kwargs) -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.Unet(f"tu-{name}", encoder_weights=None, classes=1, **kwargs)


def blobs(count: int, seed: int):
    pictures, targets = squares(count, seed)
    masks = torch.zeros(count, 1, 64, 64)
    for mask, target in zip(masks, targets, strict=True):
        left, top, right, bottom = target["boxes"][0].int().tolist()
        mask[:, top:bottom, left : min(right, 64)] = 1.0
    return torch.stack(pictures)[..., :64], masks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eca_resnet18", "ela_resnet18_b", "van_b0", "nat_mini"])
def test_a_unet_of_smp_learns_to_segment_squares(name):
    torch.manual_seed(0)
    model = unet(name)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(30):
        x, y = blobs(4, 1000 + step)
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = blobs(8, 0)
    with torch.no_grad():
        found = model.eval()(x) > 0
    overlap = (found & (y > 0)).sum() / (found | (y > 0)).sum()
    assert overlap > 0.7


@pytest.mark.parametrize("name", ["eca_resnet18", "nat_mini"])
def test_smp_builds_on_our_encoders(name):
    model = unet(name).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 96)).shape == (1, 1, 64, 96)


@EVERY_FAMILY
def test_a_config_of_openmmlab_builds_every_family(name):
    keywords = {key: value for key, value in SMALL[name].items() if key != "num_classes"}
    config = Config({"type": "FoveateBackbone", "name": name, "out_indices": [-2, -1], "frozen_stages": 1, **keywords})
    backbone = MODELS.build(config)
    assert isinstance(backbone, FoveateBackbone)
    backbone.init_weights()
    maps = backbone.train()(torch.randn(2, 3, 64, 96))
    assert isinstance(maps, tuple) and [m.shape[1] for m in maps] == backbone.channels


def test_frozen_stages_do_not_train():
    torch.manual_seed(0)
    backbone = FoveateBackbone("eca_resnet18", frozen_stages=2, norm_eval=False, depths=(1, 1, 1, 1))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], 0.1)
    sum(m.square().mean() for m in backbone.train()(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    changed = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    frozen = ("net.model.conv1", "net.model.bn1", "net.model.layer1")
    assert changed and not any(key.startswith(frozen) for key in changed)
    assert any(key.startswith("net.model.layer2") for key in changed)


def test_norms_keep_their_statistics_where_asked():
    backbone = FoveateBackbone("eca_resnet18", norm_eval=True, depths=(1, 1, 1, 1)).train()
    assert all(not m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    with pytest.raises(ValueError, match="frozen_stages must be 0 to 4"):
        FoveateBackbone("nat_mini", frozen_stages=5)


MIXERS = {
    "eca": lambda dim: ops.EfficientChannelAttention(dim),
    "ela": lambda dim: ops.EfficientLocalAttention(dim),
    "lka": lambda dim: ops.LargeKernelAttention(dim),
}


class Yolo(nn.Module):
    """A few layers of a detector at strides 2 to 8, each followed by a module of ours."""

    def __init__(self, mixer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 16), (16, 32), (32, 64)))
        self.mixers = nn.ModuleList(mixer(dim) for dim in (16, 32, 64))

    def forward(self, x):
        maps = []
        for layer, mixer in zip(self.layers, self.mixers, strict=True):
            x = mixer(nn.functional.silu(layer(x)))
            maps.append(x)
        return maps


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_modules_drop_into_a_detector(name, layout, dtype):
    torch.manual_seed(0)
    model = Yolo(MIXERS[name]).eval().to(dtype=dtype, memory_format=layout)
    x = torch.randn(2, 3, 48, 72).to(dtype=dtype, memory_format=layout)
    maps = model(x)
    assert [m.shape[-2:] for m in maps] == [(24, 36), (12, 18), (6, 9)] and all(m.dtype == dtype for m in maps)
    program = torch.export.export(model, (x,)).module()
    for got, wanted in zip(program(x), maps, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
