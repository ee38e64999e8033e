"""The local attention benchmark: its peers compute what they say, and wrong results are not timed."""

import pytest
import torch

from foveate.benchmarks import local_attention
from foveate.benchmarks.local_attention import OPS, SHAPES, Shape, bodies, flex, main, measure

SMALL = {
    "neighborhood": Shape("n", "neighborhood", 9, 2, {"kernel_size": 3, "dilation": 2}, True, 16),
    "window": Shape("w", "window", 6, 2, {"window_size": 3}, True, 16),
    "circle": Shape("c", "circle", 7, 2, {"radius": 3}, head_dim=16),
    "halo": Shape("h", "halo", 8, 2, {"block_size": 4, "halo": 1}, True, 16),
}


def inputs(shape):
    torch.manual_seed(0)
    packed = torch.randn(2, shape.side, shape.side, 3, shape.heads, shape.head_dim)
    return packed, shape.tables("cpu", torch.float32)


@pytest.mark.parametrize("kind", SMALL)
def test_gather_computes_the_same(kind):
    calls = bodies(SMALL[kind], *inputs(SMALL[kind]))
    torch.testing.assert_close(calls["ours"](), calls["gather"](), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["neighborhood", "window", "circle"])
def test_flex_attention_computes_the_same(kind):
    shape = SMALL[kind]
    packed, tables = inputs(shape)
    out = flex(shape, tables, *packed.unbind(3), compiled=False)()
    expected = OPS[shape.op](*packed.unbind(3), **shape.arguments, **tables)
    torch.testing.assert_close(out.transpose(1, 2).unflatten(1, (shape.side, shape.side)), expected)


def test_flex_attention_cannot_do_halos():
    packed, tables = inputs(SMALL["halo"])
    assert flex(SMALL["halo"], tables, *packed.unbind(3)) is None


def test_gather_is_left_out_where_it_would_copy_too_much(monkeypatch):
    shape = SMALL["halo"]
    assert shape.copied_bytes(2, 4) == 2 * 2 * 8 * 8 * 6 * 6 * 2 * 16 * 4
    monkeypatch.setattr(local_attention, "MOST_COPIES", 1000)
    assert "gather" not in bodies(shape, *inputs(shape))


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(local_attention, "SHAPES", (SMALL["circle"],))
    monkeypatch.setitem(OPS, "circle", lambda q, k, v, radius, impl: v if impl == "tiled" else q)
    with pytest.raises(RuntimeError, match="the result is wrong"):
        measure("cpu", [1], torch.float32, 1, [""])


def test_every_op_and_the_papers_maps_are_in_the_table():
    assert {shape.op for shape in SHAPES} == set(OPS)
    assert {shape.side for shape in SHAPES if shape.op == "neighborhood"} >= {56, 28, 14, 7, 128}


def test_a_report_says_command_machine_and_ratios(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(local_attention, "SHAPES", tuple(SMALL.values()))
    main(["--device", "cpu", "--batch", "1", "2", "--rounds", "1", "--only", "n", "--out", str(tmp_path / "out.txt")])
    text = (tmp_path / "out.txt").read_text()
    assert "python -m foveate.benchmarks.local_attention" in text and "CPU " in text
    assert "gather" in text and "forward" in text and "both" in text
    assert "gather" in capsys.readouterr().out


def test_a_filter_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="no layer has a name with one of"):
        measure("cpu", [1], torch.float32, 1, ["nothing"])
