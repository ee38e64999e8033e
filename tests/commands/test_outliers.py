"""`foveate outliers`: a table of roles on success, one line and an exit code on failure."""

import os

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from foveate.commands.main import app
from foveate.export.errors import ExportError
from foveate.export.outliers import by_role, kurtoses, measure_outliers
from foveate.export.simulate import OUTLIER_FREE, PRESETS, percentile_range, simulate_int8

VIT = ["patch_size=8", "img_size=32", "embed_dim=32", "depth=2", "num_heads=2", "num_classes=5"]
SMALL = [part for argument in VIT for part in ("--model-arg", argument)]


def outliers(*arguments: str):
    return CliRunner().invoke(app, ["outliers", *arguments], env={"COLUMNS": "200"})


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("pictures")
    for i, color in enumerate(("red", "blue", "white")):
        Image.new("RGB", (40, 50), color).save(f"pictures/{i}.png")
    return "pictures"


@pytest.mark.parametrize("model", ["quantizable_vit_tiny", "test_resnet"])
def test_a_model_of_any_library_gets_a_table_of_roles(model, pictures):
    more = SMALL if model != "test_resnet" else []
    done = outliers(model, "--data", pictures, "--img-size", "32", "--batch", "2", *more)
    assert done.exit_code == 0, done.output
    assert "3 images" in done.stdout and "max. kurtosis" in done.stdout
    assert "blocks.*.attn" in done.stdout if more else "layer" in done.stdout


def test_a_folder_without_images_is_one_line(pictures):
    os.mkdir("empty")
    done = outliers("test_resnet", "--data", "empty")
    assert done.exit_code != 0 and "empty" in done.stderr and "Traceback" not in done.output


class Planted(nn.Module):
    """Two numbered layers, of which the second makes one number in a thousand large."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Identity(), nn.Hardshrink(3.0))

    def forward(self, x):
        return self.layers(x).flatten(1).mean(1)


def test_outliers_show_in_norm_and_kurtosis():
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = by_role(measure_outliers(Planted(), [x[:3], x[3:]]))
    assert set(found) == {"layers.*"}
    alone = measure_outliers(Planted(), [x])
    assert alone["layers.0"].inf_norm == pytest.approx(float(x.flatten(1).abs().amax(1).mean()), rel=1e-6)
    assert alone["layers.0"].kurtosis == pytest.approx(3, abs=0.2) and alone["layers.1"].kurtosis > 50
    assert found["layers.*"].max_kurtosis == pytest.approx(alone["layers.1"].kurtosis, rel=1e-5)
    assert float(kurtoses(torch.ones(1, 9))) == 0


def test_nothing_to_measure_is_refused():
    with pytest.raises(ExportError, match="wanted batches of images, got none"):
        measure_outliers(Planted(), [])
    with pytest.raises(ExportError, match="wanted modules with outputs that can be measured, got none"):
        measure_outliers(nn.Linear(4, 4), [torch.randn(2, 4)])


def test_a_whole_model_is_simulated_in_int8_and_an_outlier_takes_the_range():
    torch.manual_seed(0)
    model = timm.create_model("quantizable_vit_tiny", patch_size=8, img_size=32, embed_dim=32, depth=2, num_heads=2)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    batches = torch.randn(6, 4, 3, 32, 32).unbind(0)
    assert PRESETS["outlier-free"] is OUTLIER_FREE
    simulated = simulate_int8(model, batches)
    with torch.no_grad():
        wanted, out = model.eval()(batches[0]), simulated(batches[0])
    assert 1e-3 < (out - wanted).norm() / (wanted - wanted.mean()).norm() < 0.2
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[3] = 500.0  # one channel of the residual stream
    steps = [net.blocks[0].second.grid.scale for net in (simulated, simulate_int8(model, batches))]
    assert steps[1] > 20 * steps[0]
    with pytest.raises(ExportError, match="wanted batches of images to observe, got none"):
        simulate_int8(model, [])


def test_percentiles_leave_out_both_ends():
    assert percentile_range(torch.arange(101.0), 99) == pytest.approx((1.0, 99.0))
