"""A small timm model, its images and its exports, made once."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from foveate.export import export_onnx, export_program, real_images

WRITERS = {"onnx": (export_onnx, "net.onnx"), "program": (export_program, "net.pt2")}
HEIGHT, WIDTH = 64, 96  # never square


def small_net(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=7, **kwargs).eval()


@pytest.fixture
def net() -> nn.Module:
    """Fresh for every test, always with the same weights."""
    return small_net()


@pytest.fixture(scope="session")
def images() -> Tensor:
    return real_images(small_net(), count=8, img_size=(HEIGHT, WIDTH))


@pytest.fixture(scope="session", params=WRITERS)
def exported(request, tmp_path_factory) -> Path:
    """The small model as an ONNX file, and as a program."""
    write, name = WRITERS[request.param]
    return write(small_net(), tmp_path_factory.mktemp("exported") / name, img_size=(HEIGHT, WIDTH))
