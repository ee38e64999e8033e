"""Which library multiplies is measured once; the allocator is told; plans of many sizes stay within bounds."""

import json
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import foveate
from foveate._errors import RequestError
from foveate.attention_ops import calibration
from foveate.attention_ops.calibration import calibration_file, cpu_key, cpu_report


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FOVEATE_PRODUCTS", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    for name in ("FOVEATE_PRODUCTS", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.delenv(name, raising=False)
    calibration._known.cache_clear()
    yield
    calibration._known.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """Replace the measurement by numbers, and return how often it was asked."""
    asked = []
    rates = {("float32", 64, 768, 768): (20.0, 10.0), ("float32", 6272, 192, 768): (10.0, 20.0)}
    monkeypatch.setattr(calibration, "_measure", lambda: asked.append(1) or dict(rates))
    return asked


def test_it_is_measured_once_and_read_by_the_next_process(measured):
    first = cpu_report()
    assert first.rates and measured == [1] and json.loads(calibration_file().read_text()).keys() == {cpu_key()}
    calibration._known.cache_clear()  # what a new process does
    assert cpu_report() == first and measured == [1]
    assert cpu_report(measure_again=True) == first and measured == [1, 1]
    assert cpu_key() in str(first) and first.table().row_count == 2


def test_a_real_measurement_compares_both_libraries():
    report = cpu_report()
    assert {key[0] for key in report.rates} <= {"float32", "bfloat16"} and report.rates
    assert all(plain > 0 and ours > 0 for plain, ours in report.rates.values())


def test_other_threads_and_instruction_sets_are_other_machines(measured, monkeypatch):
    before = cpu_key()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert cpu_key() != before
    cpu_report()
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    cpu_report()
    assert measured == [1, 1] and len(json.loads(calibration_file().read_text())) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": [{"dtype": "float32"}]}'])
def test_a_damaged_file_is_measured_again(text, measured):
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text(text)
    assert cpu_report().rates and measured == [1]
    assert cpu_key() in json.loads(calibration_file().read_text())


def test_a_folder_that_cannot_be_written_costs_a_measurement(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cpu_report().rates and measured == [1]


def test_the_faster_library_of_the_nearest_shape_multiplies(measured):
    report = cpu_report()
    takes = {rows: report.takes_product(rows, 192, 768, torch.float32) for rows in (1, 64, 100, 5000, 10**6)}
    assert takes == {1: False, 64: False, 100: False, 5000: True, 10**6: True}
    assert report.takes_product(700, 192, 768, torch.float32)  # nearer in rows to the other, in channels to this
    assert not report.takes_product(700, 768, 768, torch.float32)
    for dtype in (torch.bfloat16, torch.float64):
        assert not report.takes_product(10**6, 192, 768, dtype)


def test_fuse_measures_the_products_that_it_does_not_know(measured, monkeypatch):
    asked = []
    monkeypatch.setattr(
        calibration, "_rate", lambda *shape: asked.append(shape) or (10.0, 20.0 if shape[2] > 40 else 5.0)
    )
    net = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 32)).eval()
    x, numbers = torch.randn(64, 32), torch.get_rng_state()
    fused = foveate.fuse(net, x)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert fused.prepare(x).fused["product"] == 1
    assert asked == [(64, 32, 48, torch.float32), (64, 48, 32, torch.float32)]
    calibration._known.cache_clear()  # what a new process does
    assert foveate.fuse(net, x).prepare(x).fused["product"] == 1 and len(asked) == 2 and measured == [1]
    report = cpu_report()
    assert "products of fused models: 2 measured, oneDNN multiplies 1" in str(report)
    assert report.table().row_count == len(report.rates) + 2
    assert not cpu_report(measure_again=True).products


def test_the_report_says_where_bfloat16_does_not_pay(measured):
    rates = {("float32", 64, 8, 8): (50.0, 60.0), ("bfloat16", 64, 8, 8): (40.0, 55.0)}
    report = cpu_report()
    for of_bfloat16, pays in ((rates, False), (rates | {("bfloat16", 9, 8, 8): (70.0, 1.0)}, True)):
        found = replace(report, rates=of_bfloat16)
        assert found.bfloat16_pays == pays == ("bfloat16 products are not faster" not in str(found))
    assert not replace(report, rates={}, setting="torch").bfloat16_pays
    assert "bfloat16 products" not in str(replace(report, rates={}, setting="torch"))


@pytest.mark.parametrize("setting", ["onednn", "torch"])
def test_a_setting_decides_without_measuring(setting, measured, monkeypatch):
    monkeypatch.setenv("FOVEATE_PRODUCTS", setting)
    report = cpu_report()
    assert (report.setting, report.rates, measured) == (setting, {}, []) and not calibration_file().exists()
    assert report.takes_product(6272, 192, 768, torch.float32) == (setting == "onednn")


def test_another_setting_is_refused(monkeypatch):
    monkeypatch.setenv("FOVEATE_PRODUCTS", "mkl")
    with pytest.raises(RequestError, match="FOVEATE_PRODUCTS must be one of auto, onednn, torch, got 'mkl'"):
        cpu_report()


def test_the_setting_reaches_the_plan(monkeypatch):
    net, x = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU()).eval(), torch.randn(64, 32)
    for setting, product in (("torch", 0), ("onednn", 1)):
        monkeypatch.setenv("FOVEATE_PRODUCTS", setting)
        fused = foveate.fuse(net, x)
        assert fused.prepare(x).fused["product"] == product
        torch.testing.assert_close(fused(x), net(x).detach())


def test_training_never_asks(measured):
    """Bit-exact resume and equal ranks depend on it."""
    import timm

    model = timm.create_model("van_b0", depths=(1, 1), dims=(8, 16), mlp_ratios=(2, 2), num_classes=2)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert measured == []


MEMORY = """
import resource, torch, foveate
kept = foveate.keep_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touch(): torch.empty(2 ** 25).fill_(1.0)  # 128 MB
for _ in range(10): touch()  # aligned buffers wander over the heap at first
before = faults(); touch(); print(kept, faults() - before)
"""


@pytest.mark.skipif(platform.system() != "Linux" or platform.libc_ver()[0] != "glibc", reason="needs glibc on Linux")
def test_kept_memory_is_not_mapped_anew():
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    kept, faults = out.split()
    assert kept == "True" and int(faults) < 1000  # 32768 pages without


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert foveate.keep_memory() is False


SIZES = """
import resource, timm, torch, foveate
torch.set_num_threads(1)
model = timm.create_model("van_b0", num_classes=10).eval()
fused = foveate.fuse(model, most_sizes=2)
resident = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1e3
sizes = [(1, 64), (2, 64), (1, 96), (3, 64)]
for turn in range(6):
    for batch, side in sizes:
        fused(torch.randn(batch, 3, side, side))
    if turn == 2:
        before = resident()
print(resident() - before, len(fused._plans))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_many_sizes_keep_memory_bounded():
    out = subprocess.run([sys.executable, "-c", SIZES], capture_output=True, text=True, check=True).stdout
    grown, plans = out.split()
    assert float(grown) < 60 and plans == "2"  # MB; a plan of van_b0 holds 16 MB of weights, 12 plans were made
