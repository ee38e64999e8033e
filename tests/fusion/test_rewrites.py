"""Single rewrites of `foveate.fuse`: dilated convolutions, attention, position biases, sums in place."""

import pytest
import timm
import torch
from fused import SIZES, TIMM, assert_same, images
from small_models import alive, small
from torch import nn

import foveate
from foveate.attention_ops import NeighborhoodAttention2d, neighborhood_cpu
from foveate.attention_ops.agent_layer import AgentBiases


@pytest.mark.parametrize("most", [None, 0])
def test_position_biases_are_laid_out_once_where_they_are_small(most, monkeypatch):
    if most is not None:
        monkeypatch.setattr("foveate.fusion.attention.MOST_BIAS", most)
    model = alive(small("nat_mini", num_classes=5))
    x, calls = images(), []
    tiles = neighborhood_cpu._tile_bias
    fused = foveate.fuse(model, x)
    monkeypatch.setattr(neighborhood_cpu, "_tile_bias", lambda *args: calls.append(1) or tiles(*args))
    assert_same(fused, model, x)
    layers = sum(isinstance(module, NeighborhoodAttention2d) for module in model.modules())
    assert fused.prepare(x).fused["position bias"] == (layers if most is None else 0)
    calls.clear()
    fused(x)
    assert len(calls) == (0 if most is None else layers)


def test_a_position_bias_is_laid_out_for_strides_and_causal_axes():
    torch.manual_seed(0)
    layer = NeighborhoodAttention2d(8, 2, 4, 2, stride=(3, 4), is_causal=(True, False)).eval()
    x = torch.randn(2, 13, 17, 8)
    fused = foveate.fuse(layer)
    assert fused.prepare(x).fused["position bias"] == 1
    torch.testing.assert_close(fused(x), layer(x), rtol=1e-4, atol=1e-5)


def test_a_changed_position_bias_is_seen():
    model = alive(small("nat_mini", num_classes=5))
    fused, x = foveate.fuse(model, images()), images()
    before = fused(x)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("rpb")).add_(1).mul_(3)
    assert not torch.equal(fused(x), before)
    assert_same(fused, model, x)


DILATED = {  # (channels, out channels, kernel, options): a depthwise one that keeps the size runs by groups
    "square": ((8, 8, 3), {"padding": 2, "dilation": 2, "groups": 8}, True),
    "each axis its own": ((8, 8, (5, 3)), {"padding": (4, 3), "dilation": (2, 3), "groups": 8, "bias": False}, True),
    "one axis": ((8, 8, (1, 7)), {"padding": (0, 9), "dilation": (1, 3), "groups": 8}, True),
    "more dilated than the map is long": ((8, 8, 3), {"padding": 30, "dilation": 30, "groups": 8}, True),
    "loses the border": ((8, 8, 3), {"dilation": 2, "groups": 8}, False),
    "strided": ((8, 8, 3), {"padding": 2, "dilation": 2, "groups": 8, "stride": 2}, False),
    "two outputs a channel": ((8, 16, 3), {"padding": 2, "dilation": 2, "groups": 8}, False),
    "dense": ((8, 8, 3), {"padding": 2, "dilation": 2}, False),
    "even": ((8, 8, 4), {"padding": 3, "dilation": 2, "groups": 8}, False),
}


@pytest.mark.parametrize("kind", DILATED)
@pytest.mark.parametrize("activation", [nn.Identity(), nn.GELU()], ids=["plain", "gelu"])
def test_dilated_convolutions(kind, activation):
    arguments, options, by_groups = DILATED[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(*arguments, **options), activation).eval()
    x = torch.randn(2, 8, 13, 17)
    fused = foveate.fuse(model, x)
    assert_same(fused, model, x)
    report = fused.prepare(x)
    assert (report.fused["convolution by dilation groups"], report.fused["convolution"]) == (by_groups, not by_groups)
    assert "gelu" not in report.left


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "halonet26t"])
def test_attention_that_is_spelled_out_is_fused(name, monkeypatch):
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 0)
    model = timm.create_model(name, num_classes=5, **TIMM[name]).eval()
    x = images((2, 3, SIZES[name], SIZES[name]))
    report = foveate.fuse(model, x).prepare(x)
    assert report.fused["attention"] > 0 and "softmax.int" not in report.left


class Attention(nn.Module):
    """Attention of 6 tokens with 2 heads, its logits made by one of LOGITS."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.qkv, self.of_q = kind, nn.Linear(8, 24), nn.Linear(4, 6)
        self.table = nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x):  # (B, 6, 8)
        q, k, v = self.qkv(x).reshape(-1, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, tokens, 4)
        return LOGITS[self.kind](self, q, q @ k.transpose(-2, -1)).softmax(-1) @ v


LOGITS = {
    "plain": lambda layer, q, logits: logits,
    "scaled": lambda layer, q, logits: logits * 0.5,
    "constant": lambda layer, q, logits: layer.table + logits * 0.5,
    "of the image": lambda layer, q, logits: logits * 0.5 + layer.of_q(q),
    "of the image first": lambda layer, q, logits: layer.of_q(q).add(logits),
    "product of the image": lambda layer, q, logits: logits + q @ layer.of_q.weight.t(),
    "both": lambda layer, q, logits: (logits + layer.of_q(q)) + layer.table,
    "both in views": lambda layer, q, logits: (logits + layer.table).flatten(0, 1).reshape(-1, 2, 6, 6),
}
NO_ATTENTION = {
    "scaled after the bias": lambda layer, q, logits: (logits + layer.table) * 0.5,
    "other rank": lambda layer, q, logits: logits + layer.of_q(q[0, 0]),
    "view after the image's": lambda layer, q, logits: (logits + layer.of_q(q)).flatten(0, 1).reshape(-1, 2, 6, 6),
    "twice the weight": lambda layer, q, logits: torch.add(logits, layer.of_q(q), alpha=2),
}


@pytest.mark.parametrize("kind", [*LOGITS, *NO_ATTENTION])
def test_logits_with_biases(kind, monkeypatch):
    fuses = kind in LOGITS
    monkeypatch.setattr(f"{__name__}.LOGITS", LOGITS | NO_ATTENTION)
    model, x = Attention(kind).eval(), torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
    fused = foveate.fuse(model, x)
    assert_same(fused, model, x)
    assert fused.prepare(x).fused["attention"] == fuses


class ReadsLater(nn.Module):
    """The other term of a sum is read again afterwards, itself or a view of it that was made before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)

    def forward(self, x):
        a = self.first(x)
        view = a.flatten(2)
        return (a + self.second(x)).flatten(2) * view, a.mean()


class ReadsItself(nn.Module):
    """A layer reads the map to which its answer is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        a = self.first(x)
        return a + self.second(a)


@pytest.mark.parametrize("kind", [ReadsLater, ReadsItself])
def test_a_sum_is_not_written_over_what_is_still_read(kind):
    torch.manual_seed(0)
    model, x = kind().eval(), images()
    with torch.no_grad():
        fused = foveate.fuse(model, x)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    report = fused.prepare(x)
    assert (report.fused["sum"], report.fused["sum in place"]) == (1, 0)


@pytest.mark.parametrize("name", ["agent_deit_tiny", "agent_pvt_tiny", "agent_swin_tiny"])
def test_biases_of_agents_are_resized_once_for_each_size(name):
    model = alive(small(name, num_classes=5))
    x, other = images((2, 3, 64, 40)), images((1, 3, 48, 72))
    fused = foveate.fuse(model, x)
    assert not any("upsample" in what for what in fused.prepare(x).left)
    assert fused.prepare(x).left["agent_attention"] == sum(isinstance(m, AgentBiases) for m in model.modules())
    for size in (x, other):  # a plan of its own for each size
        assert_same(fused, model, size)
    before = fused(x)
    with torch.no_grad():
        next(p for key, p in model.named_parameters() if key.endswith("an_bias")).add_(1).mul_(3)
    assert not torch.equal(fused(x), before)
    assert_same(fused, model, x)


class Scaled(nn.Module):
    """A layer whose output is multiplied or divided by a number that has no exact float32."""

    def __init__(self, layer: nn.Module, divides: bool) -> None:
        super().__init__()
        self.layer, self.divides = layer, divides

    def forward(self, x):
        return self.layer(x) / 0.1 if self.divides else self.layer(x) * 0.1


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_factors_are_folded_in_the_precision_of_the_model(kind, divides):
    torch.manual_seed(0)
    layer, shape = (nn.Linear(6, 5), (3, 6)) if kind == "linear" else (nn.Conv2d(6, 5, 1), (3, 6, 4, 4))
    model, x = Scaled(layer, divides).double().eval(), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(foveate.fuse(model)(x), model(x), rtol=1e-13, atol=1e-13)
