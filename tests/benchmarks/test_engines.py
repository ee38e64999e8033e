"""The benchmark of engines: every column comes from its engine, and a missing figure has its reason."""

import mmap

import pytest
import timm
import torch

from foveate.benchmarks import engines, measuring
from foveate.benchmarks.engines import Row, Settings, main, notes, page_faults
from foveate.export import ExportError
from foveate.export.engines import ENGINES, prepare

TINY = Settings(models=("test_resnet",), batch=2, img_size=64, rounds=1)


@pytest.fixture(autouse=True)
def memory_as_it_was(monkeypatch, tmp_path):
    """Tell the allocator of this process nothing, and keep the user's calibration."""
    monkeypatch.setattr(engines, "keep_memory", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("engine", [name for name in ENGINES if name not in ("compiled", "aoti", "executorch")])
def test_every_engine_gives_the_models_output(engine):
    model, x = timm.create_model("test_resnet").eval(), torch.randn(2, 3, 64, 64)
    out = prepare(engine, model, x)()
    out = torch.as_tensor(out[0] if isinstance(out, list) else out)
    torch.testing.assert_close(out, model(x).detach(), rtol=1e-4, atol=1e-4)


def test_an_engine_that_cannot_is_one_line():
    class Undecided(torch.nn.Module):
        def forward(self, x):
            return x.relu() if x.sum() > 0 else x

    x = torch.randn(1, 3, 8, 8)
    for engine in ("fused", "onnxruntime"):
        with pytest.raises(ValueError) as caught:
            prepare(engine, Undecided().eval(), x)
        assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match="unknown engine 'tvm'; known: eager, fused, compiled"):
        prepare("tvm", Undecided(), x)


def test_a_table_has_every_engine_and_its_reasons(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(engines, "has_bfloat16_products", lambda: False)

    def refuse(engine, model, x):
        if engine == "openvino":
            raise ExportError("openvino: no such operator")
        return prepare(engine, model, x)

    monkeypatch.setattr(measuring, "prepare", refuse)
    arguments = ["--models", "test_resnet", "--batch", "2", "--img-size", "64", "--rounds", "1"]
    arguments += ["--engines", "kept", "fused", "onnxruntime", "openvino", "bf16"]
    main([*arguments, "--out", str(tmp_path / "out.txt")])
    for text in (capsys.readouterr().out, (tmp_path / "out.txt").read_text()):
        assert "test_resnet" in text and "batch 2, 64 px" in text and "GMAC/s" in text
        assert "test_resnet, openvino: openvino: no such operator" in text
        assert "test_resnet, bf16: this CPU has no bfloat16 products" in text


def test_a_row_compares_the_fused_model_with_the_best_rival():
    row = Row("net", 10**9, {"eager": 5.0, "fused": 30.0, "compiled": 10.0, "onnxruntime": 20.0})
    assert row.over_best == 1.5
    assert Row("net", 1, {"fused": 30.0}).over_best is None


def test_page_faults_are_counted():
    def touch():
        with mmap.mmap(-1, 2**24) as pages:  # of the system: torch's memory may be kept by another test
            pages.write(bytes(2**24))

    faults = page_faults(touch)
    assert faults is None or faults > page_faults(lambda: None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "no_such"], "unknown models: no_such"),
        (["--batch", "0"], "wanted at least 1, got batch 0"),
        (["--engines", "tvm"], "unknown engines: tvm; known: kept"),
    ],
)
def test_an_invalid_request_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


def test_without_calibration_there_is_no_limit(monkeypatch):
    monkeypatch.setenv("FOVEATE_PRODUCTS", "torch")
    monkeypatch.setattr(engines, "measure", lambda _: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="FOVEATE_PRODUCTS=auto"):
        main([])
    assert "FOVEATE_PRODUCTS=torch" in notes([])
