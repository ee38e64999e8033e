"""The report of `foveate bench`: growth with the image, files, table and pictures."""

import csv
import json
from importlib.metadata import version

import numpy as np
import pytest
import torch
from bench_rows import row
from matplotlib.colors import to_hex

from foveate.attention_ops.macs import count_macs
from foveate.benchmarks._fit import growth_exponent
from foveate.benchmarks.bench import BenchSettings, Row, measure
from foveate.benchmarks.bench_plots import FRONT, accuracy_figure, growth_figure, pareto_front, write_png
from foveate.benchmarks.bench_report import (
    describe_growth,
    fit_growth,
    header_lines,
    run_facts,
    tabulate,
    write_csv,
    write_json,
)
from foveate.benchmarks.measuring import create_model, random_images

pytestmark = pytest.mark.usefixtures("without_calibration")


def test_the_exponent_of_a_power_is_found():
    sizes = [224**2, 448**2, 896**2]
    assert growth_exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert growth_exponent(sizes, [7, 7, 7]) == pytest.approx(0)
    for bad in ([1, 2], [1, 0, 2]):
        with pytest.raises(ValueError, match="growth_exponent"):
            growth_exponent(sizes, bad)
    with pytest.raises(ValueError, match="growth_exponent"):
        growth_exponent([4, 4], [1, 2])


def grown(model: str, time: float, macs: float, memory: float | None, sizes=(224, 448, 896)) -> list[Row]:
    rows = []
    for px in sizes:
        scale = (px / 224) ** 2
        found = row(model, px=px, batch=1, seconds=[0.1 * scale**time])
        found.macs = round(1e9 * scale**macs)
        found.memory_bytes = None if memory is None else round(1e8 * scale**memory)
        rows.append(found)
    return rows


def test_growth_is_fitted_for_each_model_and_engine():
    rows = (
        grown("van_b0", 1.1, 1.0, 0.9) + grown("gqa_vit_tiny", 1.6, 1.4, None) + grown("nat_mini", 1, 1, 1, (224, 448))
    )
    local, wide = fit_growth(rows)
    assert (local.model, local.sizes, local.is_linear) == ("van_b0", (224, 448, 896), True)
    assert (local.seconds, local.memory, local.macs) == pytest.approx((1.1, 0.9, 1.0), abs=1e-3)
    assert (wide.model, wide.memory, wide.is_linear) == ("gqa_vit_tiny", None, False)
    linear, more = describe_growth([local, wide])
    assert "linear in pixels (exponent about 1)" in linear and "van_b0 eager 1.10" in linear
    assert "more than linear" in more and "gqa_vit_tiny eager 1.60" in more


def test_a_sweep_of_a_convolutional_model_is_linear_in_multiply_adds():
    settings = BenchSettings(models=("test_resnet",), engines=("eager",), batches=(1,), sizes=(64, 128, 256), rounds=1)
    (fit,) = fit_growth(measure(settings))
    assert fit.is_linear and fit.macs == pytest.approx(1, abs=0.02)


def test_a_neighborhood_is_linear_by_definition_and_dense_attention_is_not():
    rows = []
    for model in ("nat_mini", "gqa_vit_tiny"):
        with torch.device("meta"):
            net = create_model(model, 224, "meta")
            for px in (224, 448, 896):
                found = row(model, px=px)
                found.macs = count_macs(net, random_images(1, px, "meta"))
                rows.append(found)
    local, dense = fit_growth(rows)
    assert local.macs == pytest.approx(1, abs=0.01) and dense.macs > 1.1


# files and pictures


@pytest.fixture
def report():
    settings = BenchSettings(models=("van_b0", "van_b1"), against=("resnet50",), engines=("eager",), rounds=2)
    rows = [row(seconds=[0.5, 0.7]), row("van_b1", seconds=[]), row("resnet50", seconds=[1.0, 1.0])]
    rows[0].memory_bytes, rows[1].refused = 5_000_000, "no"
    return rows, settings, run_facts(settings, "foveate bench van_b0")


def test_the_header_names_machine_versions_and_date(report):
    facts = report[2]
    assert {"cpu", "features", "threads", "torch", "timm", "foveate", "python", "date", "command"} <= set(facts)
    text = "\n".join(header_lines(facts))
    assert facts["cpu"] in text and f"torch {version('torch')}" in text and facts["date"] in text
    assert f"{torch.get_num_threads()} threads" in text and "float32 - GMAC/s" in text


def test_the_table_has_a_dash_where_nothing_was_measured(report):
    table = tabulate(*report)
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["img/s"] == ["13.3", "-", "8.0"] and cells["top-1"] == ["75.4", "81.1", "80.4"]
    assert cells["memory MB"] == ["5", "-", "-"] and cells["x resnet50"] == ["1.67", "-", "1.00"]


def test_json_has_header_cells_and_every_round(report, tmp_path):
    rows, settings, facts = report
    write_json(tmp_path / "out.json", rows, settings, facts, fit_growth(grown("van_b0", 1, 1, 1)))
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["run"] == facts and [cell["seconds"] for cell in data["cells"]] == [[0.5, 0.7], [], [1.0, 1.0]]
    assert data["cells"][1]["refused"] == "no" and data["cells"][1]["images_per_second"] is None
    assert data["growth"][0]["seconds"] == pytest.approx(1)


def test_csv_has_a_line_per_cell_with_the_machine(report, tmp_path):
    write_csv(tmp_path / "out.csv", *report)
    with (tmp_path / "out.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["model"] for line in lines] == ["van_b0", "van_b1", "resnet50"]
    assert {"p50_ms", "p95_ms", "peak_memory_bytes", "product_share", "published_top1", "cpu", "date"} <= set(lines[0])
    assert float(lines[0]["speed_over_resnet50"]) == pytest.approx(5 / 3) and lines[1]["images_per_second"] == ""
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.csv"]


@pytest.mark.parametrize("write", ["csv", "json"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(report, tmp_path, monkeypatch, write):
    out = tmp_path / "out"
    out.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_csv(out, *report) if write == "csv" else write_json(out, *report, [])
    assert out.read_text() == "old" and [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out"]


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 5), (2, 4), (3, 3)], [0, 1, 2]),
        ([(1, 3), (2, 4), (3, 5)], [2]),
        ([(3, 80), (1, 84), (2, 80), (2, 82)], [1, 3, 0]),
        ([(2, 80), (2, 80), (1, 80)], [0, 1]),  # equal points: neither beats the other
        ([(1, 80), (1, 81)], [1]),
        ([], []),
    ],
)
def test_the_pareto_front_holds_what_nothing_beats(points, front):
    assert pareto_front(points) == front


def test_accuracy_is_drawn_against_speed_with_the_front():
    rows = [
        row("van_b0"),
        row("van_b1", seconds=[1.0]),
        row("van_b2", seconds=[0.9]),
        row("van_b1", "fused", seconds=[0.8]),
    ]
    rows += [row("van_b5"), row("van_b0", px=256), row("van_b3", seconds=[])]  # nothing published here, or not measured
    (axis,) = accuracy_figure(rows, "inference", "a CPU").axes
    assert axis.get_xlabel() == "inference, img/s" and axis.get_ylabel() == "published top-1 on ImageNet-1k, %"
    assert axis.get_title() == "batch 8, float32" and axis.get_xscale() == "log"
    eager, fused = (collection.get_offsets().data for collection in axis.collections)
    assert eager == pytest.approx(np.array([[16, 75.4], [8, 81.1], [8 / 0.9, 82.8]]))
    assert fused == pytest.approx(np.array([[10, 81.1]]))
    (front,) = axis.lines
    assert front.get_label() == FRONT and to_hex(front.get_color()) == to_hex("tab:red")
    assert front.get_xydata() == pytest.approx(np.array([[8 / 0.9, 82.8], [10, 81.1], [16, 75.4]]))
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["eager", "fused", FRONT]
    named = {text.get_text(): text.xy for text in axis.texts}  # once, at the fastest engine
    assert list(named) == ["van_b0", "van_b1", "van_b2"] and named["van_b1"] == (10, 81.1)


def test_sizes_of_one_model_are_told_apart():
    rows = [row("litv2_base"), row("litv2_base", px=384, seconds=[2.0])]
    (axis,) = accuracy_figure(rows, "inference", "a CPU").axes
    assert [text.get_text() for text in axis.texts] == ["litv2_base 224 px", "litv2_base 384 px"]
    assert [text.xy[1] for text in axis.texts] == [83.6, 84.7]


def test_batches_have_panels_of_their_own(tmp_path):
    figure = accuracy_figure([row(), row(batch=1), row("van_b1")], "training", "a CPU")
    assert [axis.get_title() for axis in figure.axes] == ["batch 8, float32", "batch 1, float32"]
    write_png(figure, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_growth_is_drawn_with_its_exponents():
    rows = grown("van_b0", 1.0, 1.0, 1.0) + grown("gqa_vit_tiny", 1.5, 1.4, None)
    time, memory = growth_figure(rows, fit_growth(rows), "a CPU").axes
    assert (time.get_xlabel(), time.get_ylabel(), time.get_yscale()) == ("pixels of an image", "latency, ms", "log")
    assert memory.get_ylabel() == "peak memory, MB"
    assert [line.get_xdata().tolist() for line in time.lines] == [[224**2, 448**2, 896**2]] * 2
    assert [text.get_text() for text in time.get_legend().get_texts()] == [
        "van_b0 eager float32, batch 1: 1.00",
        "gqa_vit_tiny eager float32, batch 1: 1.50",
    ]
    assert len(memory.lines) == 1
