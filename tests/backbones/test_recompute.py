"""Gradient checkpointing changes memory and time only: the same gradients, buffers and losses of layers."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from small_models import EVERY, GQA, MIXER, SMALL, size_of_images
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import foveate
from foveate.attention_ops import ClusterRouting, commitment_loss, load_balance_loss
from foveate.attention_ops._repeats import KEPT
from foveate.attention_ops.grouped_query import DynamicGroups

DYNAMIC: dict[str, tuple[str, dict[str, Any]]] = {  # layers with running state
    f"gqa_vit_tiny:{rule}, {'batch' if per_batch else 'image'}": (
        "gqa_vit_tiny",
        {**GQA, "allocation": rule, "per_batch": per_batch, "window": 2},
    )
    for rule in ("ema", "difference")
    for per_batch in (False, True)
}
ROUTING = {**MIXER, "mixer": "routing", "clusters": 2, "decay": 0.5}
DYNAMIC |= {
    "mixer_vit_tiny:google": ("mixer_vit_tiny", ROUTING),
    "mixer_vit_tiny:lucidrains": ("mixer_vit_tiny", {**ROUTING, "variant": "lucidrains", "share_qk": True}),
}
CASES = DYNAMIC | {name: (name.partition(":")[0], kwargs) for name, kwargs in EVERY.items()}
QUICK = [*DYNAMIC, "moh_transnext_small_75", "sparsifiner_deit_tiny", "agent_deit_tiny", "nat_mini:dropout"]
every_case = pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: sums have one order."""


def counted_by_torch(model: nn.Module) -> set[str]:
    """Names of the statistics of BatchNorm, which torch moves in every forward pass."""
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in norms}


def images(count: int, size: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 3, *size, generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    for of_layers, factor in ((load_balance_loss(model), 1.0), (commitment_loss(model), 1e4)):
        loss = loss if of_layers is None else loss + factor * of_layers
    return loss


def two_steps(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Return the losses, and the gradients and buffers after the second step."""
    found: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(3)
    for i, x in enumerate(batches):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        found |= {f"loss {i}": loss.detach()}
    found |= {f"grad of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    skipped = counted_by_torch(model)
    found |= {name: b.clone() for name, b in model.named_buffers() if name not in skipped}
    for name, of_layers in (("load balance", load_balance_loss(model)), ("commitment", commitment_loss(model))):
        found |= {} if of_layers is None else {name: of_layers.detach()}
    return found


def assert_equal(plain: dict[str, Tensor], again: dict[str, Tensor]) -> None:
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        assert torch.allclose(again[name], value, rtol=1e-4, atol=1e-6), name


@every_case
def test_two_steps_are_the_same_with_and_without_checkpoints(case):
    name, kwargs = CASES[case]
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).train()
    batches = images(2, size_of_images(case))
    again = copy.deepcopy(model)
    again.set_grad_checkpointing(True)
    assert_equal(two_steps(model, batches), two_steps(again, batches))


def test_mixers_in_models_of_timm_are_repeated_without_a_change():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    model = foveate.reattend(model, "routing", clusters=2, decay=0.5).train()
    again = copy.deepcopy(model)
    again.set_grad_checkpointing(True)
    batches = images(2, (32, 32))
    assert_equal(two_steps(model, batches), two_steps(again, batches))


LAYERS = {
    "groups": lambda: DynamicGroups(6, 3, False, True, 2),
    "routing": lambda: ClusterRouting(2, 4, clusters=2, window=3, decay=0.5),
}


class Calls(nn.Module):
    """A layer with running state, called on products of its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.weight = layer, nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight
        if isinstance(self.layer, ClusterRouting):
            return self.layer(x, x.flip(1), x + 1).exp()
        return x.exp() * self.layer(x).sum()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_pass_is_repeated_with_the_state_that_it_read(layer, order, reentrant):
    """Three passes before the first backward pass, in any order, and one of them twice."""
    torch.manual_seed(0)
    heads = 3 if layer == "groups" else 2
    batches = [torch.randn(2, 6, heads, 4) * (1 + i) for i in range(3)]
    gradients = []
    for checkpoints in (False, True):
        torch.manual_seed(1)
        net = Calls(LAYERS[layer]()).train()
        x = [b.clone().requires_grad_() for b in batches]
        outs = [checkpoint(net, b, use_reentrant=reentrant) if checkpoints else net(b) for b in x]
        before = {name: b.clone() for name, b in net.named_buffers()}
        for i in order:
            outs[i].sum().backward(retain_graph=not reentrant)
        if not reentrant:
            outs[order[0]].sum().backward()
        assert all(torch.equal(before[name], b) for name, b in net.named_buffers())
        gradients.append([b.grad for b in x])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_pass_that_is_no_longer_remembered_is_refused():
    net = Calls(LAYERS["groups"]()).train()
    x = torch.randn(2, 6, 3, 4, requires_grad=True)
    first = checkpoint(net, x, use_reentrant=False)
    for _ in range(KEPT):
        net(x)
    with pytest.raises(RuntimeError, match=f"not among the last {KEPT}"):
        first.sum().backward()


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_remembered_is_neither_copied_nor_saved(layer):
    net = Calls(LAYERS[layer]()).train()
    net(torch.randn(2, 6, 3 if layer == "groups" else 2, 4))
    assert len(net.layer.earlier.passes) == 1
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert len(other.layer.earlier.passes) == 0
        other(torch.randn(2, 6, 3 if layer == "groups" else 2, 4))


def test_every_family_is_among_the_cases():
    assert {name.partition(":")[0] for name in SMALL} <= {name for name, _ in CASES.values()}
