"""The benchmark of products: its process of a weaker CPU, and its table."""

import argparse

import pytest
import torch

from foveate.attention_ops import _onednn as onednn
from foveate.benchmarks import products
from foveate.benchmarks.products import SHAPES, Measured, Product, measure, measure_as, tabulate
from foveate.fusion import cpu_report


@pytest.fixture(autouse=True)
def own_calibration(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_what_fuse_takes_is_what_the_calibration_says(monkeypatch):
    monkeypatch.setattr(products, "SHAPES", ((20, 16, 24),))
    measured = measure(rounds=1)
    report, dtypes = cpu_report(), [d for d in (torch.float32, torch.bfloat16) if onednn.works(d)]
    assert [p.takes_onednn for p in measured.products] == [report.takes_product(20, 16, 24, dtype) for dtype in dtypes]
    assert all(p.torch > 0 and p.onednn > 0 for p in measured.products)
    assert str(report.file) not in measured.calibration


def test_a_weaker_cpu_is_imitated_in_a_process_of_its_own():
    measured = measure_as(("default", "SSE41", "SSE4_2"), argparse.Namespace(rounds=1, threads=1))
    assert "DEFAULT, SSE41, SSE4_2" in measured.calibration and "1 threads" in measured.calibration
    assert {(p.rows, p.inputs, p.outputs) for p in measured.products} == set(SHAPES)


def test_the_table_has_a_row_for_every_product_and_the_share_taken():
    rows = [Product("float32", 1, 2, 3, 40.0, 50.0, True), Product("float32", 1, 2, 3, 40.0, 20.0, False)]
    assert [row.taken for row in rows] == [1.25, 1.0]
    assert tabulate({"this CPU": Measured("", rows), "AVX2": Measured("", rows)}).row_count == 4
