"""The backbone benchmark: work is counted as papers count it, and every option changes what is measured."""

import pytest
import timm
import torch

from foveate.attention_ops import neighborhood_attention
from foveate.attention_ops.macs import count_macs
from foveate.benchmarks.backbones import PUBLISHED_GMACS, Row, Settings, _cells, main, measure, parse_settings

SMALL = ["--models", "test_resnet", "--batch", "2", "--img-size", "64", "--rounds", "1"]


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny_patch4_window7_224", "nat_mini", "dinat_tiny", "van_b0"])
def test_multiply_adds_are_those_the_authors_publish(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        macs = count_macs(model, torch.zeros(1, 3, 224, 224))
    assert macs / 1e9 == pytest.approx(PUBLISHED_GMACS[name], abs=0.06)  # published with one decimal


@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_neighborhood_attention_costs_what_it_needs_whatever_body_runs(impl):
    class Attend(torch.nn.Module):
        def forward(self, x):
            return neighborhood_attention(x, x, x, (3, 5), impl=impl)

    x = torch.randn(1, 14, 21, 2, 8)
    assert count_macs(Attend(), x) == 2 * x.numel() * 3 * 5


def test_the_yardstick_is_always_measured_and_first():
    rows = measure(Settings(models=("test_resnet",), batch=2, img_size=64, rounds=1))
    assert [row.name for row in rows] == ["resnet50", "test_resnet"]
    assert all(row.seconds > 0 and row.macs > 0 for row in rows)


def test_training_counts_three_passes_and_learns():
    rate = {}
    for train in (False, True):
        settings = Settings(models=(), batch=2, train=train)
        rate[train] = float(_cells(Row("resnet50", 10**6, 10**9, 0.5, None), 1e9, settings)[4])
    assert rate[True] == 3 * rate[False]


def test_a_row_is_in_the_units_of_its_header():
    cells = _cells(Row("nat_mini", 20_000_000, 2_700_000_000, 0.5, 3_000_000), 21.6e9, Settings(models=()))
    assert cells == ["20.0", "2.70", "2.7", "16.0", "43", "200%", "3"]


def test_the_authors_figure_is_for_their_size_only():
    cells = _cells(Row("nat_mini", 1, 1, 1.0, None), 1.0, Settings(models=(), img_size=96))
    assert (cells[2], cells[6]) == ("-", "-")


@pytest.mark.parametrize("train", [[], ["--train"]], ids=["inference", "training"])
def test_a_table_is_printed_and_written(train, tmp_path, capsys):
    main([*SMALL, *train, "--out", str(tmp_path / "out.txt")])
    for text in (capsys.readouterr().out, (tmp_path / "out.txt").read_text()):
        assert "test_resnet" in text and "resnet50" in text and "batch 2, 64 px" in text
        assert ("training step" in text) == bool(train)


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        main([*SMALL, "--threads", "1"])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "nat_nano"], "unknown models: nat_nano"),
        (["--batch", "0"], "wanted at least 1, got batch 0"),
        (["--device", "tpu"], "wanted device cpu, or cuda where torch sees one, got tpu"),
        (["--out", "/nowhere/x.txt"], "the folder /nowhere does not exist"),
    ],
)
def test_a_mistake_ends_with_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
