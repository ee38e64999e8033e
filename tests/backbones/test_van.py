"""What VAN's CPU inference folds, and when it does not."""

import pytest
import timm
import torch
from torch import nn
from torch.fx import symbolic_trace

from foveate.backbones import van as van_module


def van(**kwargs):
    """A small VAN in float64 whose norms and layer scales do something."""
    torch.manual_seed(0)
    model = (
        timm.create_model("van_b0", dims=(8, 8, 16, 16), depths=(2, 1, 1, 1), num_classes=5, **kwargs).double().eval()
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            nn.init.normal_(parameter)
    return model


IMAGES = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def small_maps_are_folded(monkeypatch):
    monkeypatch.setattr(van_module, "LEAST_FOLDED", 0)


@pytest.fixture
def norms_run(monkeypatch):
    """Which BatchNorms ran, by identity."""
    ran = []
    run = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: (ran.append(self), run(self, x))[1])
    return ran


def infer(model):
    with torch.no_grad():
        return model(IMAGES)


def test_folded_layers_compute_the_same(norms_run):
    model = van(drop_path_rate=0.3, proj_drop_rate=0.2)
    block = model.stages[0].blocks[1]
    plain = model(IMAGES).detach()
    assert block.norm1 in norms_run and block.norm2 in norms_run
    norms_run.clear()
    torch.testing.assert_close(infer(model), plain)
    assert block.norm1 not in norms_run and block.norm2 not in norms_run


def test_new_weights_and_statistics_are_seen_at_once():
    model = van()
    infer(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.mul_(1.1)
    torch.testing.assert_close(infer(model), model(IMAGES).detach())


def test_a_norm_in_training_mode_sees_the_batch():
    model = van()
    norm = model.stages[0].blocks[0].norm2.train()
    before = norm.running_mean.clone()
    infer(model)
    assert not torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("name", ["norm1", "norm2", "attn", "attn.proj_1", "attn.proj_2", "mlp", "mlp.fc1", "mlp.fc2"])
def test_a_hook_sees_its_layer(name):
    model, seen = van(), []
    layer = model.get_submodule(f"stages.0.blocks.1.{name}")
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    infer(model)
    assert len(seen) >= 1


def test_small_maps_are_not_folded(norms_run, monkeypatch):
    model = van()
    monkeypatch.setattr(van_module, "LEAST_FOLDED", 3 * 8 * 16 * 24)  # a map of the first stage
    infer(model)
    assert model.stages[0].blocks[0].norm1 in norms_run


def test_a_tracer_sees_the_layers():
    block = van().stages[0].blocks[0]
    with torch.no_grad():
        graph = symbolic_trace(block)
    assert {"norm1", "norm2"} <= {node.target for node in graph.graph.nodes}


def test_the_input_is_left_as_it_was():
    block, x = van().stages[0].blocks[0], torch.randn(2, 8, 16, 24, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        block(x)
    assert torch.equal(x, before)
