"""What `foveate bench` measures: cells in turns, what each number means, refusals, training."""

from types import SimpleNamespace

import pytest
import torch
from bench_rows import row

from foveate._errors import RequestError
from foveate.benchmarks import _timing, bench
from foveate.benchmarks.bench import BenchSettings, measure, notes, own_px, relative_speed
from foveate.benchmarks.bench_report import records
from foveate.benchmarks.measuring import create_model, prepare_call, product_rate, random_images, training_step
from foveate.export import ExportError, MissingExtraError

TINY = {"models": ("test_resnet",), "batches": (2,), "sizes": (32,), "rounds": 1}


pytestmark = pytest.mark.usefixtures("without_calibration")


# cells


def test_every_option_multiplies_the_cells():
    settings = BenchSettings(
        models=("test_resnet", "test_efficientnet"),
        against=("test_resnet", "test_vit"),
        engines=("eager", "fused"),
        precisions=("float32", "bfloat16"),
        batches=(1, 2),
        sizes=(32, 64),
    )
    cells = settings.cells()
    assert len(cells) == len(set(cells)) == 3 * 2 * 2 * 2 * 2  # a rival that is a model too is measured once
    assert {cell.model for cell in cells} == {"test_resnet", "test_efficientnet", "test_vit"}


def test_without_sizes_a_model_is_measured_at_its_own():
    assert own_px("fv_halonet26t") == 256 and own_px("litv2_base.in1k_384") == 384
    settings = BenchSettings(models=("van_b0", "fv_halonet26t"), engines=("eager",))
    assert [cell.px for cell in settings.cells()] == [224, 256]


def test_cells_take_turns(monkeypatch):
    seen = []

    def prepare(engine, model, images, precision):
        return lambda: seen.append(f"{engine[0]}{len(images)}")

    monkeypatch.setattr(bench, "prepare_call", prepare)
    monkeypatch.setattr(_timing, "SETTLE", 0)
    monkeypatch.setattr(bench, "peak_bytes", lambda call, device, first: None)
    settings = BenchSettings(models=("test_resnet",), batches=(1, 2), sizes=(32,), rounds=3)
    rows = measure(settings)
    assert seen == ["e1", "e1", "f1", "f1", "e2", "e2", "f2", "f2"] * (1 + 3)  # one warm-up
    assert all(len(row.seconds) == 3 for row in rows)


def test_a_cell_is_measured_in_its_engine():
    rows = measure(BenchSettings(**{**TINY, "engines": ("eager", "fused"), "rounds": 2}))
    assert [row.cell.engine for row in rows] == ["eager", "fused"]
    for found in rows:
        assert found.refused is None and found.images_per_second > 0 and found.macs > 10**6
        assert found.p95_ms >= found.p50_ms == pytest.approx(2e3 / found.images_per_second)


def test_a_model_that_refuses_a_size_says_why_and_the_others_go_on():
    settings = BenchSettings(
        models=("ninformer", "test_resnet"), engines=("eager",), batches=(1,), sizes=(33,), rounds=1
    )
    refused, measured = measure(settings)
    assert refused.seconds == [] and "33" in refused.refused
    assert measured.seconds and measured.refused is None
    (line,) = notes([refused, measured], settings)
    assert line.startswith("not measured: ninformer eager float32, 1 x 33 px: ")


def test_an_engine_that_refuses_says_why_and_the_others_go_on(monkeypatch):
    def prepare(engine, model, images, precision):
        if engine == "fused":
            raise ExportError("fused: no such operator")
        return prepare_call(engine, model, images, precision)

    monkeypatch.setattr(bench, "prepare_call", prepare)
    settings = BenchSettings(**{**TINY, "batches": (1, 2)})
    rows = measure(settings)
    assert [bool(row.seconds) for row in rows] == [True, False, True, False]
    cells = "test_resnet fused float32, 1 x 32 px; test_resnet fused float32, 2 x 32 px"
    assert notes(rows, settings) == [f"not measured: {cells}: fused: no such operator"]


def test_images_that_do_not_fit_into_memory_are_refused(monkeypatch):
    monkeypatch.setattr("foveate._memory.free_bytes", lambda: 10**6)
    (found,) = measure(BenchSettings(**{**TINY, "engines": ("eager",), "sizes": (64,)}))
    assert "need about" in found.refused


def test_a_cpu_without_bfloat16_products_is_noted(monkeypatch):
    monkeypatch.setattr(bench, "has_bfloat16_products", lambda: False)
    settings = BenchSettings(**{**TINY, "precisions": ("bfloat16",)})
    assert notes([], settings) == ["bfloat16: this CPU has no bfloat16 products, which makes it slower than float32"]
    assert notes([], BenchSettings(**TINY)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("van_b9",)}, "unknown model 'van_b9'; did you mean van_b"),
        ({"models": ("van_b0.nowhere",)}, "unknown model 'van_b0.nowhere'"),
        ({"against": ("resnet51",)}, "unknown model 'resnet51'"),
        ({"engines": ("tvm",)}, "unknown engine 'tvm'; known: eager, fused, compile, onnx, openvino"),
        ({"precisions": ("int4",)}, "unknown precision 'int4'; known: float32, bfloat16"),
        ({"device": "tpu"}, "--device: wanted cpu, or cuda where torch sees a GPU, got tpu"),
        ({"batches": (0,)}, "wanted a number >= 1, got --batch 0"),
        ({"rounds": 0}, "wanted a number >= 1, got --rounds 0"),
    ],
)
def test_a_request_that_cannot_work_is_refused(changes, message):
    with pytest.raises(RequestError) as caught:
        BenchSettings(**{**TINY, **changes})
    assert message in str(caught.value)


def test_an_engine_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(bench.PACKAGES, "onnx", ("export", "no_such_runtime"))
    with pytest.raises(MissingExtraError, match=r'needs no_such_runtime: pip install "foveate\[export\]"'):
        BenchSettings(**{**TINY, "engines": ("onnx",)})


# numbers


def test_speed_and_latency_are_of_the_rounds():
    found = row(batch=4, seconds=[0.1, 0.3, 0.2, 0.2, 1.2])
    assert (found.images_per_second, found.p50_ms) == (20, 200) and found.p95_ms == pytest.approx(1020)
    assert found.gmacs_per_second == pytest.approx(20)
    assert row(batch=4, seconds=[0.2], passes=3).gmacs_per_second == pytest.approx(60)
    assert row(seconds=[]).images_per_second is None


def test_the_share_of_the_product_rate_is_that_of_the_precision(monkeypatch):
    settings = BenchSettings(**TINY)
    facts = {"product_gmacs_per_second_float32": 64.0}
    assert records([row()], settings, facts)[0]["product_share"] == pytest.approx(16 / 64)
    assert records([row()], settings, {"product_gmacs_per_second_float32": None})[0]["product_share"] is None


def test_the_product_rate_is_the_fastest_product_of_the_calibration(monkeypatch):
    rates = {("float32", 1, 2, 3): (10.0, 30.0), ("float32", 4, 5, 6): (20.0, 5.0), ("bfloat16", 1, 2, 3): (7.0, 9.0)}
    monkeypatch.setattr("foveate.benchmarks.measuring.cpu_report", lambda: SimpleNamespace(rates=rates))
    assert (product_rate("float32"), product_rate("bfloat16")) == (30.0, 9.0)
    rates.clear()
    assert product_rate() is None


def test_a_rival_divides_rows_of_the_same_engine_and_batch():
    rows = [
        row("van_b0"),
        row("van_b0", "fused"),
        row("resnet50", seconds=[1.0]),
        row("resnet50", "fused", seconds=[0.25]),
    ]
    assert [relative_speed(rows, one, "resnet50") for one in rows] == [2, 0.5, 1, 1]
    assert relative_speed(rows, row("van_b0", batch=1), "resnet50") is None
    assert relative_speed([row(), row("resnet50", px=256)], row(), "resnet50") == 1  # each at its own size
    several = [row(), row("resnet50", px=256), row("resnet50", px=288)]
    assert relative_speed(several, several[0], "resnet50") is None


# training


def test_a_training_step_updates_the_weights_and_counts_three_passes():
    settings = BenchSettings(**{**TINY, "train": True, "engines": ("eager", "fused")})
    trained, refused = measure(settings)
    assert trained.passes == 3 and trained.images_per_second > 0
    assert refused.refused == "fused does not train; eager and compile do"
    model = create_model("test_resnet", 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.fc.weight.clone()
    training_step(model, random_images(2, 32))()
    assert torch.equal(model.fc.weight, before) and model.fc.weight.grad.any()
    training_step(model, random_images(2, 32), optimizer)()
    assert not torch.equal(model.fc.weight, before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_in_bfloat16_is_autocast(precision):
    model, seen = create_model("test_resnet", 32), []

    def forward(x):
        seen.append(torch.is_autocast_enabled("cpu"))
        return model(x)

    training_step(model, random_images(2, 32), forward=forward, precision=precision)()
    assert seen == [precision == "bfloat16"] and model.fc.weight.dtype == torch.float32


def test_a_compiled_model_takes_the_place_of_the_model():
    class Compiled(torch.nn.Module):  # like torch's: asking for its truth asks for the length of the model
        def __len__(self):
            raise TypeError("no length")

        def forward(self, x):
            seen.append(len(x))
            return model(x)

    model, seen = create_model("test_resnet", 32), []
    training_step(model, random_images(2, 32), forward=Compiled())()
    assert seen == [2]


def test_inference_in_bfloat16_is_of_a_copy():
    model = create_model("test_resnet", 32)
    out = prepare_call("eager", model, random_images(1, 32), "bfloat16")()
    assert out.dtype == torch.bfloat16 and model.fc.weight.dtype == torch.float32


def test_engines_of_the_cpu_refuse_other_devices():
    with pytest.raises(ExportError, match="onnxruntime runs on the CPU, not on meta"):
        prepare_call("onnxruntime", create_model("test_resnet", 32), torch.empty(1, 3, 32, 32, device="meta"))
