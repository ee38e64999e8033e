"""Layers that timm has not: the same numbers, in another order of memory or of images."""

import pytest
import torch
import torch.nn.functional as F

from foveate.backbones import _layers
from foveate.backbones._layers import MapGELU, by_images


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
