"""Structurally pruned nets in Triton's interpreter: the kernels take whatever heads and widths are left.

The gates of VAN, ECA-Net and ELA are plain layers; here their weights go to the ops.
"""

import copy
from contextlib import contextmanager

import pytest
import timm
import torch
from gates import gates_by_op
from torch import Tensor, nn

from foveate.attention_ops import _checks, _op
from foveate.pruning import plan

STAGES = {"dims": (32, 64), "depths": (1, 1), "head_dim": 16}
BIFORMER = STAGES | {"topks": (2, 1), "dense_heads": 4, "regions": 2}
BLOCKS = {"depths": (1, 1, 1, 1)}
NETS = {  # name -> how it is built, what it can lose, its ops
    "nat_mini": (STAGES | {"kernel_size": 3}, "heads channels mlp", {"neighborhood_attention"}),
    "biformer_tiny": (BIFORMER, "heads channels mlp", {"routed_attention"}),
    "fv_davit_tiny": (STAGES | {"window_size": 3}, "heads channels mlp", {"window_attention", "channel_attention"}),
    "van_b0": ({"dims": (8, 16), "depths": (1, 1), "mlp_ratios": (2, 2)}, "conv mlp", {"large_kernel_attention"}),
    "litv2_small": (STAGES | {"windows": (2, 2), "alpha": 0.5}, "heads mlp", {"hilo_attention", "window_attention"}),
    "fv_halonet_h0": (BLOCKS | {"block_size": 4, "halo": 1}, "heads channels conv", {"halo_attention"}),
    "eca_resnet50": (BLOCKS, "conv", {"channel_gate"}),
    "ela_resnet50_l": (BLOCKS, "conv width", {"strip_gate"}),
}
SMALL = ("nat_mini", "biformer_tiny", "fv_davit_tiny", "van_b0")  # the others take the interpreter seconds to minutes
LEFT = {"one of each": (0.99, "layer"), "uneven": (0.4, "group")}
CASES = [
    pytest.param(name, left, marks=() if name in SMALL else pytest.mark.slow, id=f"{name}-{left}")
    for name in NETS
    for left in LEFT
    if left == "one of each" or name in (*SMALL, "litv2_small")
]


@pytest.fixture
def decisions(monkeypatch) -> list[tuple[str, str, str | None]]:
    """(op, the body that runs, the reason why not the fused one) of every call from here on."""
    made = []

    choose = _op.choose

    def note(op, impl, why_not_fused):
        run = choose(op, impl, why_not_fused)
        made.append((op, run.value, why_not_fused))
        return run

    monkeypatch.setattr(_op, "choose", note)
    return made


def build(name: str, **kwargs) -> nn.Module:
    """A net whose weights leave nothing near zero."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, **(NETS[name][0] | kwargs))
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
    return net.eval()


def images() -> Tensor:
    return torch.randn(1, 3, 24, 32, generator=torch.Generator().manual_seed(2))


@contextmanager
def without_kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_checks, "why_no_triton", lambda x: "switched off")
        yield


@without_kernels()  # planning runs the net, to count
def pruned(name: str, left: str) -> nn.Module:
    net = build(name)
    ratio, scope = LEFT[left]
    cut = plan(net, "random", ratio, structure=NETS[name][1].split(), scope=scope, img_size=32).cut(net)
    return gates_by_op(cut)


def results(net: nn.Module, x: Tensor, with_gradients: bool) -> list[Tensor]:
    if not with_gradients:
        with torch.no_grad():
            return [net(x)]
    out = net(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(net.parameters()))]


def check(net: nn.Module, ops: set[str], decisions: list, with_gradients: bool = False) -> None:
    """Run the net fused, tiled, and in double, which no kernel takes: the first must err no more than the second."""
    x = images()
    decisions.clear()
    fused = results(net, x, with_gradients)
    assert {(op, run) for op, run, _ in decisions} == {(op, "fused") for op in ops}
    decisions.clear()
    truth = results(copy.deepcopy(net).double(), x.double(), with_gradients)
    assert {(op, run) for op, run, _ in decisions} == {(op, "tiled") for op in ops}
    assert all("the kernels take float32" in why for _, _, why in decisions)
    with without_kernels():
        tiled = results(net, x, with_gradients)
    largest = max(exact.abs().max() for exact in truth)  # in small gradients, sums of large numbers cancel
    for ours, plain, exact in zip(fused, tiled, truth, strict=True):
        floor = torch.finfo(torch.float32).eps * max(32 * exact.abs().max(), largest)
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


@pytest.mark.parametrize(("name", "left"), CASES)
def test_a_pruned_net_runs_on_the_kernels(name, left, decisions):
    check(pruned(name, left), NETS[name][2], decisions)


@pytest.mark.parametrize("name", SMALL)
def test_a_pruned_net_learns_through_the_kernels(name, decisions):
    check(pruned(name, "uneven"), NETS[name][2], decisions, with_gradients=True)


def test_what_is_left_is_odd():
    layers = [m for m in pruned("nat_mini", "one of each").modules() if hasattr(m, "rpb")]
    assert [(m.heads, m.proj.in_features) for m in layers] == [(1, 1), (1, 1)]
    layers = [m for m in pruned("nat_mini", "uneven").modules() if hasattr(m, "rpb")]
    assert any(m.proj.in_features // m.heads % 2 for m in layers)
    gates = [m for m in pruned("van_b0", "uneven").modules() if hasattr(m, "conv_spatial")]
    assert any(m.conv0.weight.shape[0] % 2 for m in gates)


def test_a_head_too_wide_for_the_kernels_fits_once_channels_are_gone(decisions):
    wide = build("nat_mini", dims=(131,), depths=(1,), head_dim=131, kernel_size=3)
    narrow = plan(wide, "magnitude", 4 / 131, structure=["channels"], img_size=32).cut(wide)
    decisions.clear()
    with torch.no_grad():
        wide(images())
        narrow(images())
    why = "the kernels take a head_dim of at most 128, got 131"
    assert [made[1:] for made in decisions] == [("tiled", why), ("fused", None)]
