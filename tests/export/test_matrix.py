"""Every family in every format: the file's outputs equal the model's at two batches."""

import pytest
import torch
from small_models import SMALL, alive, check_outputs, small

from foveate.export import open_file
from foveate.export.formats import FORMATS, Format, Request, write_verified

SIZE = (64, 96)
FORMATS_RUN = [Format.ONNX, Format.TORCH, Format.OPENVINO, Format.HUB, Format.AOTI, Format.EXECUTORCH]


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS_RUN, ids=lambda entry: entry.value)
@pytest.mark.parametrize("name", SMALL)
def test_a_family_in_a_format(name, file_format, tmp_path):
    pytest.importorskip("executorch") if file_format is Format.EXECUTORCH else None
    model, images = alive(small(name)), torch.randn(4, 3, *SIZE)
    out = tmp_path / f"net{FORMATS[file_format].suffix or ''}"
    request = Request(model, out, file_format, None if file_format is Format.HUB else SIZE)
    agreement = write_verified(request, images, 1e-3)
    assert agreement is not None and agreement.batch_sizes == (1, 3) and agreement.top1 == 1.0
    file = open_file(out)
    check_outputs(model, lambda batch: file.run(batch)[0], images.split([1, 3]), noise=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["van_b0", "eca_resnet18", "eca_mobilenet_v2"])
def test_a_family_in_core_ml(name, tmp_path):
    coremltools = pytest.importorskip("coremltools")
    out = tmp_path / "net.mlpackage"
    assert write_verified(Request(alive(small(name)), out, Format.COREML, SIZE), torch.randn(4, 3, *SIZE), 1e-4) is None
    shape = (
        coremltools.models.MLModel(str(out), skip_model_load=True)
        .get_spec()
        .description.input[0]
        .type.multiArrayType.shape
    )
    assert list(shape) == [1, 3, *SIZE]
