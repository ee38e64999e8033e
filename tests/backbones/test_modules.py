"""A module of a model is what it looks like: what a user attaches to it acts in every mode, on the whole batch."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache

import pytest
import torch
from small_models import KINDS, SMALL, alive, small
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from foveate.attention_ops import (
    EfficientChannelAttention,
    EfficientLocalAttention,
    LargeKernelAttention,
    MohAggregatedAttention,
)
from foveate.attention_ops.halo import RelativePosition
from foveate.attention_ops.moh import MohBase
from foveate.backbones._layers import DepthwiseMlp
from foveate.backbones.moh_transnext import ConvGlu
from foveate.backbones.van import VanMlp

BATCH = 3
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
LEAST_CHANGE = 1e-3  # of the output's standard deviation: what is equal because it is ignored does not count
# Halo, routed, dense and flow attention take another body where no gradient is wanted, which sums in another order.
ROUNDING = 2e-5  # of the same, between the modes; and of the change itself
MOST_DIFFERENCE = 1e-3
WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
HEAVY = ("fv_sehalonet33ts", "fv_eca_halonext26ts", "fv_haloregnetz_b")  # more of timm's blocks around our attention
every_kind = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in KINDS]
)


def disturbed(x):
    """Change every value of a tensor, or of the tensors in a tuple, in a pattern that no norm takes out."""
    if isinstance(x, tuple):
        return tuple(disturbed(part) for part in x)
    if not isinstance(x, Tensor):  # the size of a map
        return x
    pattern = torch.arange(x.numel(), device=x.device, dtype=torch.float32).add(1).mul(1.7).sin().view(x.shape)
    return x + ((x.abs().mean() + 0.1) * pattern).to(x.dtype)


@lru_cache
def built(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A small model in eval mode, images and the output. Tests attach to the model and take off what they attached."""
    model = alive(small(name, num_classes=5))
    x = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return model, x, model(x).detach()


@lru_cache
def roles(name: str) -> dict[tuple, str]:
    """What each module is for the module whose forward calls it, and the first module of the model with that role.

    That caller is the next module above that is no plain nn.Sequential.
    """
    model = built(name)[0]
    found: dict[tuple, str] = {}
    for path, module in model.named_modules():
        caller, inner = model, path
        for end in (dot.start() for dot in re.finditer(r"\.", path)):
            if type(above := model.get_submodule(path[:end])) is not nn.Sequential:
                caller, inner = above, path[end + 1 :]
        if path:
            found.setdefault((type(model), type(caller), re.sub(r"\d+", "*", inner), type(module)), path)
    return found


@lru_cache
def first_of_their_roles(name: str) -> list[tuple[str, bool]]:
    """Modules whose roles no model of the same class before this one has; and whether a forward of ours calls them."""
    names = list(KINDS)
    before = {role for other in names[: names.index(name)] for role in roles(other)}
    new = {role: path for role, path in roles(name).items() if role not in before}
    return [(path, role[1].forward.__module__.startswith("foveate")) for role, path in new.items()]


# What a user attaches: context managers that take it off again.


@contextmanager
def hook(model: nn.Module, path: str) -> Iterator[None]:
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, out: disturbed(out))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def pre_hook(model: nn.Module, path: str) -> Iterator[None]:
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: disturbed(args))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def patched_forward(model: nn.Module, path: str) -> Iterator[None]:
    module = model.get_submodule(path)
    run = module.forward
    module.forward = lambda *args, **kwargs: disturbed(run(*args, **kwargs))
    try:
        yield
    finally:
        del module.forward


@contextmanager
def replaced(model: nn.Module, path: str, make: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
    module = model.get_submodule(path)
    model.set_submodule(path, make(module).eval())
    try:
        yield
    finally:
        model.set_submodule(path, module)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return disturbed(self.inner(*args, **kwargs))


def wrapper(model: nn.Module, path: str):
    return replaced(model, path, Wrapper)


def subclass(model: nn.Module, path: str):
    def make(module: nn.Module) -> nn.Module:
        kind = type(module)

        def forward(self, *args, **kwargs):
            return disturbed(kind.forward(self, *args, **kwargs))

        copy = deepcopy(module)
        copy.__class__ = type(f"My{kind.__name__}", (kind,), {"forward": forward})
        return copy

    return replaced(model, path, make)


class Disturbed(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return disturbed(weight)


def parametrization(model: nn.Module, path: str):
    def make(module: nn.Module) -> nn.Module:
        copy = deepcopy(module)
        for name, _ in list(copy.named_parameters(recurse=False)):
            parametrize.register_parametrization(copy, name, Disturbed())
        return copy

    return replaced(model, path, make)


def new_weights(model: nn.Module, path: str):
    def make(module: nn.Module) -> nn.Module:
        copy = deepcopy(module)
        for name, parameter in list(copy.named_parameters(recurse=False)):
            setattr(copy, name, nn.Parameter(disturbed(parameter.detach())))
        return copy

    return replaced(model, path, make)


class LowRank(nn.Module):
    """LoRA: the layer plus a product of two small ones."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        if isinstance(base, nn.Linear):
            self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        else:
            place = (base.kernel_size, base.stride, base.padding, base.dilation)
            self.down = type(base)(base.in_channels, 2, *place, bias=False)
            self.up = type(base)(2, base.out_channels, 1, bias=False)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def low_rank(model: nn.Module, path: str):
    torch.manual_seed(3)
    return replaced(model, path, LowRank)


def weight_norm(model: nn.Module, path: str):
    def make(module: nn.Module) -> nn.Module:
        copy = parametrizations.weight_norm(deepcopy(module))
        length = copy.parametrizations.weight.original0
        length.data.copy_(disturbed(length.data))  # alone it changes nothing
        return copy

    return replaced(model, path, make)


def spectral_norm(model: nn.Module, path: str):
    def make(module: nn.Module) -> nn.Module:
        torch.manual_seed(4)
        copy = parametrizations.spectral_norm(deepcopy(module))
        weight = copy.parametrizations.weight.original
        weight.data.copy_(disturbed(weight.data))  # a LayerNorm behind the layer takes another scale out
        return copy

    return replaced(model, path, make)


def pruning(model: nn.Module, path: str):
    def make(module: nn.Module) -> nn.Module:
        return prune.l1_unstructured(deepcopy(module), "weight", max(module.weight.numel() // 2, 1))

    return replaced(model, path, make)


TO_MODULES = (hook, pre_hook, wrapper, subclass, patched_forward)
TO_PARAMETERS = (parametrization, new_weights)
TO_WEIGHTS = (low_rank, weight_norm, spectral_norm, pruning)


def takes(attach: Callable, module: nn.Module) -> bool:
    if attach is pre_hook:
        return not isinstance(module, RelativePosition)  # it is called without arguments
    if attach in TO_PARAMETERS:
        return bool(list(module.parameters(recurse=False)))
    return attach in TO_MODULES or isinstance(module, WEIGHTED)


def never_called(model: nn.Module) -> set[str]:
    """The stochastic depth of timm's MobileNet blocks that have no shortcut, its dropout of probabilities that SDPA
    makes; lists, whose modules are called."""
    modules = dict(model.named_modules())
    idle = {f"{path}.drop_path" for path, module in modules.items() if getattr(module, "has_skip", True) is False}
    idle |= {f"{path}.attn_drop" for path, module in modules.items() if getattr(module, "fused_attn", False)}
    return idle | {path for path, module in modules.items() if isinstance(module, nn.ModuleList)}


def faults(name: str, attach: Callable, where: list[str]) -> list[str]:
    """What is wrong when `attach` is used on each of the modules alone."""
    model, x, plain = built(name)
    unit, found = plain.std(), []
    for path in where:
        if not takes(attach, model.get_submodule(path)) or path in never_called(model):
            continue
        outs = {}
        with attach(model, path):
            for mode, context in MODES.items():
                with context():
                    outs[mode] = model(x).detach()
        change = ((outs["grad"] - plain).abs().max() / unit).item()
        apart = {mode: ((out - outs["grad"]).abs().max() / unit).item() for mode, out in outs.items()}
        if not change > LEAST_CHANGE:
            found.append(f"{path}: changes {change:.1e}")
        most = ROUNDING + MOST_DIFFERENCE * change
        found += [f"{path}: {mode} differs by {d:.1e}" for mode, d in apart.items() if not d <= most]
    return found


@every_kind
@pytest.mark.parametrize("attach", [*TO_MODULES, *TO_PARAMETERS, *TO_WEIGHTS], ids=lambda f: f.__name__)
def test_what_is_attached_acts_in_every_mode(name, attach):
    """One module of each role; where timm's code calls it, a patched forward only (the slow test has all).

    The next test has every module of one model of each family, with a hook and with other weights.
    """
    everywhere = attach is patched_forward
    assert faults(name, attach, [path for path, ours in first_of_their_roles(name) if ours or everywhere]) == []


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("attach", [hook, parametrization], ids=lambda f: f.__name__)
def test_what_is_attached_to_any_module_of_a_family_acts_in_every_mode(name, attach):
    assert faults(name, attach, [path for path, _ in built(name)[0].named_modules() if path]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name not in HEAVY])  # those take an hour
@pytest.mark.parametrize("attach", [*TO_MODULES, *TO_PARAMETERS, *TO_WEIGHTS], ids=lambda f: f.__name__)
def test_what_is_attached_to_any_module_acts_in_every_mode(name, attach):
    assert faults(name, attach, [path for path, _ in built(name)[0].named_modules() if path]) == []


def calls_of(model: nn.Module, x: Tensor) -> dict[str, list[int]]:
    """The batch size that every module sees, call by call; -1 where it is called without a tensor."""
    calls: dict[str, list[int]] = {path: [] for path, _ in model.named_modules() if path}
    handles = [
        module.register_forward_hook(lambda _, args, out, path=path: calls[path].append(len(args[0]) if args else -1))
        for path, module in model.named_modules()
        if path
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return calls


def called_twice(model: nn.Module) -> set[str]:
    """Layers that serve two places, as in the authors' code: each call is on the whole batch."""
    shared = set()
    for path, module in model.named_modules():
        if isinstance(module, EfficientLocalAttention):  # rows and columns
            shared |= {f"{path}.conv", f"{path}.norm"}
        if isinstance(module, VanMlp | DepthwiseMlp | ConvGlu):  # one dropout behind both layers
            shared.add(f"{path}.drop")
        if isinstance(module, MohAggregatedAttention):  # tokens and pooled cells
            shared.add(f"{path}.kv")
        attends = hasattr(module, "attn") or hasattr(module, "attns")
        if attends and hasattr(module, "mlp"):  # one stochastic depth for both branches of a block
            shared.add(f"{path}.drop_path")
    return shared


def of_positions(model: nn.Module) -> set[str]:
    """The layers that make a table of position biases: what they see is no image."""
    found = {path for path, module in model.named_modules() if isinstance(module, MohBase)}
    return {f"{path}.cpb_{layer}" for path in found for layer in ("fc1", "act", "fc2")}


def check_calls(name: str, batch: int, side: int) -> None:
    model, _, _ = built(name)
    with_no_tensor = {path for path, module in model.named_modules() if isinstance(module, RelativePosition)}
    skipped, twice, tables = never_called(model), called_twice(model), of_positions(model)
    for path, sizes in calls_of(model, torch.randn(batch, 3, side, side)).items():
        if path not in skipped:
            assert len(sizes) == 1 or (path in twice and len(sizes) == 2), f"{path} is called {len(sizes)} times"
            whole = sizes == [-1] if path in with_no_tensor else all(size and size % batch == 0 for size in sizes)
            assert whole or path in tables, f"{path} sees {sizes} of {batch} images"  # a window counts as an image


@every_kind
def test_a_hook_sees_the_whole_batch_once_in_every_mode(name):
    for context in MODES.values():
        with context():
            check_calls(name, BATCH, 32)


@pytest.mark.slow
@every_kind
def test_a_hook_sees_the_whole_batch_of_large_images_once(name):
    with torch.inference_mode():
        check_calls(name, 13, 256)


@every_kind
def test_the_modes_give_the_same_bits(name):
    """Halo, routed, dense and flow attention excepted, see above."""
    model, x, plain = built(name)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = model(x)
        if "halo" in name or name.startswith(("biformer", "vitrpb")) or name.endswith("flow"):
            torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5 * plain.std().item())
        else:
            assert torch.equal(out, plain)


@every_kind
def test_linear_layers_and_convolutions_are_torchs_own(name):
    layers = [module for module in small(name).modules() if isinstance(module, WEIGHTED)]
    assert {type(layer) for layer in layers} <= {nn.Linear, nn.Conv2d, nn.Conv1d}


ao = pytest.importorskip("torch.ao.quantization", reason="this torch has no torch.ao")
quantizing = pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated, and says so at every layer


@quantizing
@every_kind
def test_quantize_dynamic_finds_every_linear_layer(name):
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no quantized kernels for this CPU")
    model, x, plain = built(name)
    quantized = ao.quantize_dynamic(model, {nn.Linear})
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linears and all(
        isinstance(quantized.get_submodule(path), torch.ao.nn.quantized.dynamic.Linear) for path in linears
    )
    with torch.inference_mode():
        out = quantized(x)
    assert not torch.equal(out, plain) and (out - plain).norm() < 0.5 * (plain - plain.mean()).norm()


GATES = [LargeKernelAttention, EfficientChannelAttention, EfficientLocalAttention]


@quantizing
@pytest.mark.parametrize("kind", GATES, ids=lambda kind: kind.__name__)
def test_quantization_aware_training_acts_on_the_layers_of_gates(kind):
    torch.manual_seed(0)
    gate, x = alive(kind(16)).train(), torch.randn(2, 16, 8, 8)
    plain = gate(x).detach()
    gate.qconfig = ao.get_default_qat_qconfig("x86")
    trained = ao.prepare_qat(gate)
    fakes = [module for module in trained.modules() if isinstance(module, ao.FakeQuantizeBase)]
    out = trained(x)
    assert fakes and all(0 < fake.scale.max() < 1 for fake in fakes)  # each has seen what it quantizes
    assert 1e-4 < (out.detach() - plain).abs().max() / plain.std() < 1
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trained.parameters())
