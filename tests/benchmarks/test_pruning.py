"""The pruning benchmarks: what is timed was checked, and the tables say what was measured."""

from types import SimpleNamespace

import pytest
import timm
import torch

from foveate.benchmarks import pruning as speed
from foveate.benchmarks import pruning_mnist5k as digits
from foveate.pruning import group_of_weights
from foveate.train.model import build_net
from foveate.train.recipe import recipe_data


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
    table = digits.tabulate("van", [3, 5], [{"dense": 97.0, "dimap 50%": 90.0}, {"dense": 98.0, "dimap 50%": 91.0}])
    assert table.title.startswith("van: ")
    assert [column.header for column in table.columns] == ["model", "seed 3", "seed 5", "mean"]
    assert list(table.columns[3].cells) == ["97.5", "90.5"]


def test_every_method_takes_the_same_number_of_weights():
    net = timm.create_model("van_b0", num_classes=10, in_chans=1, dims=(8, 16), depths=(1, 1), mlp_ratios=(2, 2))
    images = torch.zeros(2, 1, 28, 28)
    wanted = sum(net.get_parameter(name).numel() for name in group_of_weights(net)) // 2
    for name in digits.METHODS:
        zeroed = digits.zeroed(net, name, 0.5, seed=0, px=images.shape[-1])
        gone = sum(int((zeroed.get_parameter(n) == 0).sum()) for n in group_of_weights(net))
        assert abs(gone - wanted) <= len(group_of_weights(net)), name


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Names of trained recipes; training is replaced, so that models keep random weights."""
    started = []

    def train(recipe, *, work_dir, **kwargs):
        loaded = digits.load_recipe(recipe, kwargs.get("cfg_options"))
        started.append(loaded.model.name if isinstance(recipe, str) else f"tuned {loaded.model.name}")
        path = work_dir / "net.pth"
        work_dir.mkdir(parents=True)
        net = build_net(loaded)
        state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
        torch.save({"meta": {"recipe": recipe_data(loaded)}, "state_dict": state}, path)
        return SimpleNamespace(last_checkpoint=path)

    monkeypatch.setattr(digits, "train", train)
    monkeypatch.setattr(digits, "held_out", lambda: (torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.int64)))
    monkeypatch.setattr(digits, "RATIOS", (0.5, 0.9))
    return started


def test_recipes_with_a_fine_tuning_recipe_are_tuned_and_others_are_not(trained, tmp_path, capsys):
    out = tmp_path / "table.txt"
    digits.main(["--recipes", "nat_micro_1xb64_mnist5k", "van_micro_1xb64_mnist5k", "--seeds", "4", "--out", str(out)])
    assert trained == ["nat_mini", "tuned nat_mini", "tuned nat_mini", "van_b0"]
    nat, van = out.read_text().split("van_micro_1xb64_mnist5k: top-1")
    for table in (nat.split("nat_micro_1xb64_mnist5k: top-1")[1], van):
        assert all(f"{method} {ratio:.0%}" in table for method in digits.METHODS for ratio in digits.RATIOS)
    assert nat.count("tuned") == 2 and "tuned" not in van


def test_nets_may_be_trained_longer(trained, tmp_path):
    recipe, out = "swin_micro_1xb64_mnist5k", tmp_path / "table.txt"
    arguments = ["--recipes", recipe, "--seeds", "4", "--epochs", "7", "--work-dir", str(tmp_path), "--out", str(out)]
    digits.main(arguments)
    assert f"{recipe}, 7 epochs: top-1" in " ".join(out.read_text().split())
    meta = torch.load(tmp_path / recipe / "4" / "dense" / "net.pth")["meta"]
    assert meta["recipe"]["schedule"]["epochs"] == 7 and meta["recipe"]["seed"] == 4


def test_an_unknown_recipe_is_refused_before_any_training(trained, capsys):
    with pytest.raises(SystemExit):
        digits.main(["--recipes", "nat_micro_1xb64_mnist5k", "vna_micro"])
    assert "vna_micro" in capsys.readouterr().err and trained == []
