"""Norms folded into the convolutions before them: the same results, and only where nobody could see the difference."""

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from foveate.backbones import _folding
from foveate.backbones._folding import conv_norm
from foveate.backbones._layers import ImageConv2d


@pytest.fixture(autouse=True)
def small_maps_are_folded(monkeypatch):
    monkeypatch.setattr(_folding, "LEAST_FOLDED", 0)
    monkeypatch.setattr(_folding, "LEAST_REUSE", 0)


def at_work(norm):
    """A norm whose statistics and weights all matter, in eval mode."""
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    return norm.eval()


PAIRS = {
    "biased": lambda: (nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)),
    "depthwise, activation": lambda: (
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        BatchNormAct2d(4, act_layer=nn.ReLU6, inplace=True),
    ),
    "1x1, no activation": lambda: (nn.Conv2d(4, 6, 1, bias=False), BatchNormAct2d(6, apply_act=False)),
    "images": lambda: (ImageConv2d(4, 6, 3, 2), BatchNormAct2d(6)),
    "sequence": lambda: (nn.Conv2d(4, 6, 1), nn.Sequential(nn.BatchNorm2d(6), nn.AvgPool2d(2))),
}


def pair(kind):
    torch.manual_seed(0)
    conv, norm = PAIRS[kind]()
    at_work(norm[0] if isinstance(norm, nn.Sequential) else norm)
    return conv.eval(), norm.eval()


@pytest.fixture
def norms_run(monkeypatch):
    """How often a norm ran."""
    runs = []
    for kind in (nn.BatchNorm2d, BatchNormAct2d):
        run = kind.forward
        monkeypatch.setattr(kind, "forward", lambda m, x, run=run: runs.append(m) or run(m, x))
    return runs


@pytest.mark.parametrize("kind", PAIRS)
def test_a_folded_norm_gives_the_same_result(kind, norms_run):
    conv, norm = pair(kind)
    x = torch.randn(2, 4, 9, 7)
    expected = norm(conv(x))
    with torch.no_grad():
        norms_run.clear()
        out = conv_norm(conv, norm, x)
        assert norms_run == []
        torch.testing.assert_close(out, expected)
        conv.weight.mul_(2)  # weights may change in between
        torch.testing.assert_close(conv_norm(conv, norm, x), norm(conv(x)))
    assert out.is_contiguous(memory_format=torch.channels_last) == (kind == "images")


def hook(module):
    return module.register_forward_hook(lambda *args: None)


REASONS = {
    "the norm learns": lambda conv, norm: norm.train(),
    "the convolution is looked at": lambda conv, norm: hook(conv),
    "the norm is looked at": lambda conv, norm: hook(norm),
    "another kind of convolution": lambda conv, norm: setattr(conv, "__class__", type("Other", (nn.Conv2d,), {})),
    "another kind of norm": lambda conv, norm: setattr(norm, "__class__", type("Other", (nn.BatchNorm2d,), {})),
    "no statistics": lambda conv, norm: norm.register_buffer("running_var", None),
    "half precision": lambda conv, norm: (conv.bfloat16(), norm.bfloat16()),
}


@pytest.mark.parametrize("why", REASONS)
def test_it_stays_where_folding_could_be_seen_or_is_not_exact(why, norms_run):
    conv, norm = pair("biased")
    if why == "no statistics":
        norm.register_buffer("running_mean", None)
    REASONS[why](conv, norm)
    with torch.no_grad():
        conv_norm(conv, norm, torch.randn(2, 4, 9, 7, dtype=conv.weight.dtype))
    assert norms_run == [norm]


def test_a_hook_on_the_whole_sequence_sees_it():
    (conv, sequence), seen = pair("sequence"), []
    sequence.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        out = conv_norm(conv, sequence, torch.randn(2, 4, 9, 7))
    assert seen[0] is out


def test_it_stays_under_gradients_autocast_and_tracers(norms_run):
    conv, norm = pair("biased")
    x = torch.randn(2, 4, 9, 7)
    conv_norm(conv, norm, x).sum().backward()
    assert norm.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        conv_norm(conv, norm, x)
    assert norms_run == [norm] * 2

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv, norm

        def forward(self, x):
            return conv_norm(self.conv, self.norm, x)

    assert [n.target for n in torch.fx.symbolic_trace(Net()).graph.nodes if n.op == "call_module"] == ["conv", "norm"]


def test_small_maps_and_large_weights_are_not_folded(norms_run, monkeypatch):
    conv, norm = pair("biased")
    x = torch.randn(2, 4, 9, 7)
    out, weights = 2 * 4 * 6 * (9 * 7 // 4), conv.weight.numel()
    with torch.no_grad():
        monkeypatch.setattr(_folding, "LEAST_FOLDED", 10**9)
        conv_norm(conv, norm, x)
        monkeypatch.setattr(_folding, "LEAST_FOLDED", 0)
        monkeypatch.setattr(_folding, "LEAST_REUSE", out // weights + 1)
        conv_norm(conv, norm, x)
    assert norms_run == [norm] * 2


@pytest.mark.parametrize("name", ["eca_mobilenet_v2", "ela_mobilenet_v2", "fv_halonet_h1"])
def test_nets_fold_every_norm_behind_a_convolution(name, norms_run):
    torch.manual_seed(0)
    model, x = timm.create_model(name).double().eval(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    norms = [at_work(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    expected = model(x)
    assert len(norms_run) == len(norms)
    norms_run.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    left = {n.rpartition(".")[2] for n, m in model.named_modules() if m in norms_run}
    assert left == ({"post_attn"} if "halonet" in name else set())
