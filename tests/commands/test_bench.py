"""`foveate bench`: options reach the measurement, files hold it, and mistakes end in one line before any work."""

import csv
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import foveate
from foveate.benchmarks import bench_report, measuring
from foveate.commands import bench as command
from foveate.commands.main import app
from foveate.export import ExportError

TINY = ("test_resnet", "--batch", "1", "--size", "32", "--rounds", "1", "--engine", "eager")


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path, one_thread):
    """A folder to write to; no products are measured, and the user's file of them stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FOVEATE_PRODUCTS", "torch")


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


def cells(*arguments: str) -> list[dict]:
    done = run(*arguments, "--json", "out.json")
    assert done.exit_code == 0, done.output
    with open("out.json") as file:
        return json.load(file)["cells"]


def test_a_run_prints_header_and_table_and_writes_files(kept):
    done = run(*TINY, "--csv", "out.csv", "--json", "out.json")
    assert done.exit_code == 0, done.output
    for words in ("CPU ", "Features ", "Versions foveate", "test_resnet", "img/s", "p95 ms", "of products"):
        assert words in done.stdout
    with open("out.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    with open("out.json") as file:
        data = json.load(file)
    (cell,) = data["cells"]
    assert line["model"] == cell["model"] == "test_resnet" and float(line["p50_ms"]) == cell["p50_ms"] > 0
    assert data["run"]["threads"] == torch.get_num_threads() and data["run"]["command"].startswith("foveate")
    assert kept == ["commands.bench"]


@pytest.mark.parametrize(
    ("options", "key", "values"),
    [
        (("--batch", "1,2"), "batch", [1, 2]),
        (("--size", "32,64"), "px", [32, 64]),
        (("--engine", "eager,fused"), "engine", ["eager", "fused"]),
        (("--precision", "float32,bfloat16"), "precision", ["float32", "bfloat16"]),
        (("--train", "--batch", "2"), "mode", ["train"]),
        (("--against", "timm:test_efficientnet"), "model", ["test_resnet", "test_efficientnet"]),
        (("--against", "timm:test_resnet,test_vit"), "model", ["test_resnet", "test_vit"]),
    ],
)
def test_an_option_changes_what_is_measured(options, key, values):
    found = cells(*TINY, *options)
    assert [cell[key] for cell in found] == values
    assert all(cell["images_per_second"] > 0 for cell in found)


def test_rounds_and_threads_are_those_of_the_options():
    before = torch.get_num_threads()
    try:
        (cell,) = cells(*TINY, "--rounds", "4", "--threads", str(before + 1))
        assert len(cell["seconds"]) == 4 and torch.get_num_threads() == before + 1
        with open("out.json") as file:
            assert json.load(file)["run"]["threads"] == before + 1
    finally:
        torch.set_num_threads(before)


def test_the_entries_of_the_files_are_documented():
    done = run(
        *TINY,
        "--against",
        "timm:test_efficientnet",
        "--sweep",
        "--size",
        "32,48,64",
        "--csv",
        "a.csv",
        "--json",
        "a.json",
    )
    assert done.exit_code == 0, done.output
    page = (Path(foveate.__file__).parent / "docs/measure.md").read_text(encoding="utf-8")
    with open("a.json") as file:
        data = json.load(file)
    with open("a.csv", newline="") as file:
        names = set(next(csv.reader(file)))
    assert names == {*data["run"], *data["cells"][0]} - {"seconds"}
    for whole, part in (("test_efficientnet", "NAME"), ("float32", "PRECISION")):
        names = {name.replace(whole, part) for name in names}
    names = names - {"foveate", "torch", "timm", "python", "system"} | {"run", "growth", *data["growth"][0]}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_a_pattern_names_our_models_and_nothing_is_a_default():
    assert command._models(["van_b[01]", "resnet50"]) == ("van_b0", "van_b1", "resnet50")
    assert command._models(["timm:resnet50", "van_b0", "resnet50"]) == ("resnet50", "van_b0")
    assert command._models([]) == command._models(None) == command.MODELS


def test_a_rival_has_a_column():
    done = run(*TINY, "--against", "timm:test_efficientnet", "--json", "out.json")
    assert "x" in done.stdout and "test_efficientnet" in done.stdout
    with open("out.json") as file:
        ours, rival = json.load(file)["cells"]
    assert rival["speed_over_test_efficientnet"] == 1
    quotient = ours["images_per_second"] / rival["images_per_second"]
    assert ours["speed_over_test_efficientnet"] == pytest.approx(quotient)


def test_a_sweep_prints_and_writes_the_exponents(monkeypatch):
    drawn = []
    monkeypatch.setattr(command, "growth_figure", lambda rows, fits, machine: drawn.append(fits))
    monkeypatch.setattr(command, "write_png", lambda figure, path: None)
    done = run(*TINY, "--sweep", "--size", "32,64,128", "--json", "out.json", "--png", "out.png")
    assert done.exit_code == 0, done.output
    assert "growth with pixels" in done.stdout and "linear in pixels (exponent about 1)" in done.stdout
    with open("out.json") as file:
        (fit,) = json.load(file)["growth"]
    assert fit["sizes"] == [32, 64, 128] and fit["macs"] == pytest.approx(1, abs=0.05) and len(drawn) == 1


def test_accuracy_against_speed_is_drawn(monkeypatch):
    figures, write = [], command.write_png
    monkeypatch.setattr(command, "write_png", lambda figure, path: (figures.append(figure), write(figure, path)))
    arguments = ("van_b0", "test_resnet", "--batch", "1", "--rounds", "1", "--engine", "eager")
    done = run(*arguments, "--png", "out.png", "--json", "out.json")
    assert done.exit_code == 0, done.output
    (axis,) = figures[0].axes
    with open("out.json") as file:
        speed = json.load(file)["cells"][0]["images_per_second"]
    assert axis.collections[0].get_offsets().tolist() == [pytest.approx([speed, 75.4])]
    assert [text.get_text() for text in axis.texts] == ["van_b0"]
    assert "not drawn, no accuracy is published at this size: test_resnet" in done.stdout
    with open("out.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_cells_that_are_refused_are_dashes_with_a_reason_below_the_table(monkeypatch):
    prepare = measuring.prepare

    def refuse(engine, model, x):
        if engine == "fused":
            raise ExportError("fused: no such operator")
        return prepare(engine, model, x)

    monkeypatch.setattr(measuring, "prepare", refuse)
    done = run(*TINY, "--engine", "eager,fused")
    assert done.exit_code == 0, done.output
    assert "not measured: test_resnet fused float32, 1 x 32 px: fused: no such operator" in done.stdout
    monkeypatch.setattr(measuring, "prepare", lambda *_: (_ for _ in ()).throw(ExportError("none")))
    failed = run(*TINY, "--json", "out.json", "--png", "out.png", "--size", "224", "van_b0")
    assert failed.exit_code == 1 and failed.stderr.endswith("foveate bench: no cell could be measured\n")
    with open("out.json") as file:
        assert [cell["refused"] for cell in json.load(file)["cells"]] == ["none", "none"]


def test_the_share_is_of_the_measured_products(monkeypatch):
    monkeypatch.setattr(bench_report, "product_rate", lambda precision, device: 50.0)
    (cell,) = cells(*TINY)
    assert cell["product_share"] == pytest.approx(cell["gmacs_per_second"] / 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("van_b9",), "unknown model 'van_b9'; did you mean van_b"),
        (("vam_*",), "no model matches 'vam_*'"),
        (("--engine", "tvm"), "unknown engine 'tvm'; known: eager, fused, compile"),
        (("--engine", ",eager"), "--engine: wanted names with commas between them"),
        (("--against", "tf:resnet50"), "--against: wanted timm:NAME, timm has no model 'tf:resnet50'"),
        (("--against", "timm:resnet51"), "--against: wanted timm:NAME, timm has no model 'resnet51'"),
        (("--batch", "0"), "--batch: wanted numbers from 1 to 65536 with commas between them, got '0'"),
        (("--batch", "x"), "--batch: wanted numbers"),
        (("--size", "224,1e9"), "--size: wanted numbers from 1 to 8192 with commas between them, got '1e9'"),
        (("--precision", "int4"), "unknown precision 'int4'; known: float32, bfloat16"),
        (("--device", "tpu"), "--device: wanted cpu, or cuda where torch sees a GPU, got tpu"),
        (("--rounds", "0"), "Invalid value for '--rounds'"),
        (("--threads", "0"), "Invalid value for '--threads'"),
        (("--csv", "nowhere/out.csv"), "--csv nowhere/out.csv: wanted a file in a folder that exists"),
        (("--json", "."), "--json .: wanted a file in a folder that exists"),
        (("--csv", "a", "--json", "./a"), "--csv, --json and --png: wanted different files"),
        (("--sweep", "--size", "224,448"), "--sweep: wanted at least 3 sizes, got 2"),
        (("van_b5", "--png", "a.png"), "--png: no accuracy is published for these models at these sizes"),
        (("van_b0", "--size", "256", "--png", "a.png"), "--png: no accuracy is published"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(arguments, message, monkeypatch):
    monkeypatch.setattr(command, "_run", lambda settings: pytest.fail("measured"))
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("foveate bench: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert done.stdout == ""


def test_without_matplotlib_a_picture_is_refused(monkeypatch):
    monkeypatch.setattr("foveate.export.files.find_spec", lambda name: None)
    done = run("van_b0", "--png", "out.png", "--engine", "eager")
    assert done.exit_code == 2 and 'needs matplotlib: pip install "foveate[demo]"' in done.stderr
