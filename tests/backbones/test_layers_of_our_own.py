"""Layers that timm has not: the same numbers, in another order of memory or of images."""

import pytest
import timm
import torch
import torch.nn.functional as F

from foveate.backbones import _layers
from foveate.backbones._layers import (
    BiasLastLinear,
    DepthwiseMlp,
    ImageConv2d,
    MapGELU,
    MapMlp,
    OverwritingGELU,
    add_biases_last,
    by_images,
    take_images_channels_last,
)


def test_map_gelu_is_exact_gelu_and_keeps_the_layout():
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    out = MapGELU()(x)
    torch.testing.assert_close(out, F.gelu(x))
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def seen(monkeypatch):
    """A function that doubles its input and notes the sizes of the batches it is given."""
    monkeypatch.setattr(_layers, "CHUNK_BYTES", 3 * 10 * 4)  # three images of ten float32
    sizes = []

    def double(x):
        sizes.append(len(x))
        return 2 * x

    double.sizes = sizes
    return double


def test_inference_takes_as_many_images_as_fit(seen):
    x = torch.randn(7, 10)
    with torch.no_grad():
        assert torch.equal(by_images(seen, x, 10), 2 * x)
        by_images(seen, x, 10_000)
    assert seen.sizes == [3, 3, 1] + [1] * 7


def test_training_takes_the_batch_whole(seen):
    by_images(seen, torch.randn(7, 10), 10)
    assert seen.sizes == [7]


class Doubler(torch.nn.Module):
    def forward(self, x):
        return by_images(lambda y: 2 * y, x, 10)


def test_an_exported_graph_takes_any_batch_whole(monkeypatch):
    monkeypatch.setattr(_layers, "CHUNK_BYTES", 3 * 10 * 4)
    with torch.no_grad():
        program = torch.export.export(
            Doubler(), (torch.randn(7, 10),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    assert "split" not in str(program.graph)
    assert program.module()(torch.randn(3, 10)).shape == (3, 10)


def test_an_empty_batch_passes():
    with torch.no_grad():
        assert by_images(lambda x: x, torch.zeros(0, 10), 10).shape == (0, 10)


MLPS = {
    "linear": (lambda: MapMlp(4, 6), (5, 3, 2, 4)),
    "1x1": (lambda: MapMlp(4, 6, use_conv=True), (5, 4, 3, 2)),
    "depthwise": (lambda: DepthwiseMlp(4, 6, drop=0.0), (5, 3, 2, 4)),
}


@pytest.mark.parametrize("kind", MLPS)
def test_mlps_take_a_few_images_at_a_time_for_the_same_result(monkeypatch, kind):
    torch.manual_seed(0)
    make, shape = MLPS[kind]
    mlp, x, sizes = make(), torch.randn(shape), []
    mlp.fc1.register_forward_hook(lambda module, args, out: sizes.append(out.numel()))
    whole = mlp(x)
    monkeypatch.setattr(_layers, "CHUNK_BYTES", 2 * 36 * 4)  # two images of 6 hidden channels x 6 places
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), whole)
    assert sizes == [5 * 36, 2 * 36, 2 * 36, 36]


def test_biases_added_last_give_the_same_result_gradients_and_keys():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Sequential(torch.nn.Linear(5, 4, bias=False)))
    x, keys, inner = torch.randn(2, 3, 6), list(net.state_dict()), net[1][0]
    expected = net(x)
    gradients = torch.autograd.grad(expected.sum(), net.parameters())
    add_biases_last(net)
    assert isinstance(net[0], BiasLastLinear) and net[1][0] is inner and list(net.state_dict()) == keys
    torch.testing.assert_close(torch.autograd.grad(net(x).sum(), net.parameters()), gradients)
    kept = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)
        torch.testing.assert_close(torch.jit.script(net)(x), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert net(x).dtype == torch.bfloat16
    assert torch.equal(x, kept)


def test_the_product_comes_first_in_inference_only(monkeypatch):
    layer, x = BiasLastLinear(6, 5), torch.randn(3, 6)
    monkeypatch.setattr(F, "linear", lambda *args: pytest.fail("the bias came first"))
    with torch.no_grad():
        layer(x)
    with pytest.raises(pytest.fail.Exception):
        layer(x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_parts_of_another_shape_keep_the_layout_of_what_makes_them(monkeypatch, layout):
    monkeypatch.setattr(_layers, "CHUNK_BYTES", 1)
    conv, x = torch.nn.Conv2d(3, 5, 3, 2).eval(), torch.randn(3, 3, 8, 9).contiguous(memory_format=layout)
    with torch.no_grad():
        out, whole = by_images(conv, x, 1), conv(x)
    assert out.stride() == whole.stride()
    torch.testing.assert_close(out, whole)


NETS = {"fv_halonet26t": (16, "stages.0.0"), "fv_haloregnetz_b": (16, "stages.0.0"), "eca_mobilenet_v2": (24, "bn1")}
NETS |= {"ela_mobilenet_v2_b": (24, "bn1")}


@pytest.mark.parametrize("name", NETS)
def test_first_layers_take_a_few_images_at_a_time_for_the_same_result(monkeypatch, name):
    torch.manual_seed(0)
    values_per_pixel, inner = NETS[name]
    model, x, sizes, whole_sizes = timm.create_model(name).eval(), torch.randn(3, 3, 64, 96), [], []
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.weight)  # timm starts branches at zero
    run = type(model.get_submodule(inner)).forward
    monkeypatch.setattr(type(model.get_submodule(inner)), "forward", lambda m, x: sizes.append(len(x)) or run(m, x))
    expected = model(x)  # with gradients: whole
    assert set(sizes) == {3}
    monkeypatch.setattr(_layers, "CHUNK_BYTES", 2 * values_per_pixel * 64 * 96 * 4)  # two images
    with torch.no_grad():
        sizes.clear()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * expected.std().item())
        assert {2, 1} <= set(sizes)
        for hooked in (inner, inner.partition(".")[0] if "." in inner else "blocks"):
            layer = model.get_submodule(hooked)
            handle = layer.register_forward_hook(lambda m, args, out: whole_sizes.append(len(out)))
            model(x)
            handle.remove()
        assert whole_sizes == [3, 3]  # whoever hooks a layer sees the batch
        sizes.clear()
        model.train()(x)
        assert set(sizes) == {3}  # and so does a BatchNorm that learns


def test_overwriting_gelu_keeps_its_input_only_where_somebody_may_need_it():
    layer, x = torch.nn.Linear(4, 5), torch.randn(3, 5)
    gelu, expected, kept = OverwritingGELU(layer), F.gelu(x), x.clone().requires_grad_()
    torch.testing.assert_close(gelu(kept), expected)
    assert torch.equal(kept, x)
    with torch.no_grad():
        handle = layer.register_forward_hook(lambda module, args, out: None)
        torch.testing.assert_close(gelu(x), expected)
        assert not torch.equal(x, expected)
        handle.remove()
        out = gelu(x)
    assert out.data_ptr() == x.data_ptr()
    torch.testing.assert_close(out, expected)


def test_parts_of_a_batch_keep_the_dtype_that_autocast_gives_them(monkeypatch):
    monkeypatch.setattr(_layers, "CHUNK_BYTES", 1)
    layer, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = by_images(layer, x, 4)
        assert out.dtype == torch.bfloat16 and torch.equal(out, layer(x))


def test_the_first_convolution_turns_images_channels_last_under_the_same_keys():
    net = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2, 1)), torch.nn.Conv2d(4, 6, 3))
    x, keys = torch.randn(2, 3, 9, 12), list(net.state_dict())
    with torch.no_grad():
        expected = net(x)
        take_images_channels_last(net)
        out = net.eval()(x)
    assert isinstance(net[0][0], ImageConv2d) and list(net.state_dict()) == keys
    assert out.is_contiguous(memory_format=torch.channels_last) and not expected.stride(1) == 1
    torch.testing.assert_close(out, expected)
    assert net(x).is_contiguous()  # gradients in eval mode: the order of sums of the net that it was
    assert net.train()(x).is_contiguous(memory_format=torch.channels_last)
