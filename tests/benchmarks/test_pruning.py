"""The pruning benchmarks: what is timed was checked, and the tables say what was measured."""

import pytest
import torch

from foveate.benchmarks import pruning as speed
from foveate.benchmarks import pruning_mnist5k as digits


def test_a_small_net_is_timed_dense_and_cut(tmp_path, capsys):
    out = tmp_path / "table.txt"
    speed.main(["--models", "test_vit", "--img-size", "160", "--batch", "1", "--rounds", "1", "--out", str(out)])
    text = out.read_text()
    assert text.splitlines()[0].startswith("Command  python -m foveate.benchmarks.pruning")
    rows = [line.split("│") for line in text.splitlines() if "test_vit" in line and "│" in line]
    assert [row[2].strip() for row in rows] == ["layer", "group"]
    assert all(float(cell) > 0 for row in rows for cell in row[5:11])
    assert all(row[3].strip().endswith("%") and int(row[3].strip()[:-1]) < 100 for row in rows)
    assert "test_vit" in capsys.readouterr().out


def test_speed_ups_are_dense_time_over_cut_time():
    row = speed.Row("net", "layer", 0.5, 0.5, {"torch": 0.5, "torch dense": 1.0})
    assert speed._cells(row, batch=4) == ["8.0", "4.0", "2.00", "-", "-", "-"]


def test_a_net_that_was_cut_wrongly_is_not_timed(monkeypatch):
    real = speed.plan

    def wrong(net, *args, **kwargs):
        p = real(net, *args, **kwargs)
        monkeypatch.setattr(type(p), "apply", lambda self, model: model)  # the net with zeros has none
        return p

    monkeypatch.setattr(speed, "plan", wrong)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        speed.measure("test_vit", 1, 160, 1, with_onnx=False)


def test_top1_is_the_share_of_right_answers():
    images, targets = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert digits.top1(torch.nn.Identity(), images, targets) == 75.0


def test_the_digits_table_has_seeds_and_their_mean():
    table = digits.tabulate([3, 5], [{"dense": 97.0, "dimap 50%": 90.0}, {"dense": 98.0, "dimap 50%": 91.0}])
    assert [column.header for column in table.columns] == ["net", "seed 3", "seed 5", "mean"]
    assert list(table.columns[3].cells) == ["97.5", "90.5"]
