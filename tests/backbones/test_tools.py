"""Tools that act on modules act on every family: adapters, quantization, masks, feature extractors, tracers."""

import copy
import warnings

import pytest
import torch
from small_models import EVERY, alive, size_of_images, small
from torch import nn
from torch.nn.utils import prune

FAST: tuple[str, ...] = (
    "nat_mini",
    "van_b0",
    "biformer_tiny",
    "litv2_small",
    "fv_davit_tiny",
    "eca_resnet18",
    "ela_resnet18_b",
)
FAST += ("agent_deit_tiny", "moh_transnext_small_75", "flowformer_cv", "sparsifiner_deit_tiny", "ninformer")
EVERY_KIND = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]
)
LAYERS = (nn.Linear, nn.Conv2d)


def images(name: str, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *size_of_images(name), generator=torch.Generator().manual_seed(3))


def loss_of_all_layers(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return a loss whose gradient every layer gets; predictors of connections learn from matrices, not from logits."""
    loss = model(x).square().sum()
    if hasattr(model, "dense_features"):
        loss = loss + sum(matrix.square().sum() for matrix in model.dense_features(x)[1])  # type: ignore[operator]
    return loss


def layers(model: nn.Module, kinds=LAYERS) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@EVERY_KIND
def test_an_adapter_of_peft_acts_in_every_layer(name):
    from peft import LoraConfig, get_peft_model

    model = alive(small(name))
    x = images(name)
    before = model(x).detach()
    adaptable = {key: m for key, m in layers(model).items() if getattr(m, "dilation", (1, 1)) == (1, 1)}
    groups = {key: getattr(module, "groups", 1) for key, module in adaptable.items()}  # peft's adapters do not dilate
    ranks = {f"^{key}$".replace(".", r"\."): 2 * count for key, count in groups.items()}
    get_peft_model(model, LoraConfig(r=2, rank_pattern=ranks, target_modules=list(groups)))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4 * before.std().item())  # B is zero
    loss_of_all_layers(model, x).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if ".lora_B." in key}
    assert len(gradients) == len(groups)
    assert [key for key, grad in gradients.items() if grad is None or not grad.any()] == []


@EVERY_KIND
def test_quantization_aware_training_sees_every_layer(name):
    from torch.ao import quantization as ao

    model = alive(small(name)).train()
    model.qconfig = ao.get_default_qat_qconfig("x86")
    counted = len(layers(model))
    prepared = ao.prepare_qat(copy.deepcopy(model))
    prepared(images(name, 4)).square().sum().backward()
    fakes = [m for m in prepared.modules() if isinstance(m, LAYERS) and hasattr(m, "weight_fake_quant")]
    assert len(fakes) == counted
    assert all(m.weight_fake_quant.activation_post_process.min_val.numel() > 0 for m in fakes)
    assert all(torch.isfinite(m.activation_post_process.activation_post_process.max_val).all() for m in fakes)


@EVERY_KIND
def test_dynamic_quantization_finds_every_linear_layer(name):
    from torch.ao.nn.quantized import dynamic
    from torch.ao.quantization import quantize_dynamic

    model = alive(small(name))
    counted = len(layers(model, nn.Linear))
    wanted, quantized = model(images(name)), quantize_dynamic(model, {nn.Linear}, torch.qint8)
    got = quantized(images(name))
    assert len(layers(quantized, dynamic.Linear)) == counted and not layers(quantized, nn.Linear)
    difference = (got - wanted).square().mean().sqrt() / wanted.std()
    assert difference < 0.5 and (counted == 0 or difference > 0)


@EVERY_KIND
def test_torchao_quantizes_every_linear_layer(name):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = alive(small(name))
    wanted = model(images(name))
    linear = layers(model, nn.Linear)
    quantize_(model, Int8WeightOnlyConfig(version=2))
    assert all(type(module.weight).__name__ == "Int8Tensor" for module in linear.values())
    difference = (model(images(name)) - wanted).square().mean().sqrt() / wanted.std()
    assert difference < 0.5 and (not linear or difference > 0)


@EVERY_KIND
def test_a_mask_of_torchs_pruning_acts_in_every_layer(name):
    model = alive(small(name))
    for module in layers(model).values():
        prune.l1_unstructured(module, "weight", amount=0.3)
    loss_of_all_layers(model, images(name)).backward()
    for key, module in layers(model).items():
        grad, mask = module.weight_orig.grad, module.weight_mask
        assert grad is not None and grad[mask == 1].any() and not grad[mask == 0].any(), key


@EVERY_KIND
def test_torchvision_extracts_features_of_every_stage(name):
    from timm.models import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = alive(small(name))
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    nodes = get_graph_node_names(model, tracer_kwargs=tracer)[1]
    stages = [info["module"] for info in model.feature_info][-2:]
    last = [[node for node in nodes if node == stage or node.startswith(f"{stage}.")][-1] for stage in stages]
    with torch.no_grad():
        found = create_feature_extractor(model, last, tracer_kwargs=tracer)(images(name))
    assert list(found) == last and all(value.isfinite().all() for value in found.values())


@EVERY_KIND
def test_torch_pruning_traces_the_model(name):
    import torch_pruning

    if name.partition(":")[0] in ("biformer_tiny", "biformer_stl"):
        pytest.xfail("Torch-Pruning 1.6 counts the uses of the parts of a split as parts; values are used twice")
    model = alive(small(name))
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=images(name, 1))
    assert {id(m) for m in layers(model).values()} <= {id(m) for m in graph.module2node}
