"""Fine-tuning keeps zeros: the hook holds a plan's masks in a real training run, averages of weights included."""

from types import SimpleNamespace

import pytest
import timm
import torch

from foveate.export import save_hub
from foveate.pruning import PruningError, plan
from foveate.pruning.hook import KeepMasks
from foveate.train import TrainError, load_net, train
from foveate.train.checkpoints import net_weights, read_checkpoint

MICRO = {"dims": (16, 32), "depths": (1, 1), "head_dim": 8, "kernel_size": 3, "in_chans": 1, "num_classes": 10}
HOOK = KeepMasks.__name__


def recipe(tmp_path, **changes):
    return {
        "model": {"name": "nat_mini", "checkpoint": str(tmp_path / "weights.pth")} | MICRO,
        "data": {"source": "mnist5k", "img_size": 28, "mean": (0.13,), "std": (0.31,), "workers": 0},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.05},
        "schedule": {"epochs": 1},
        "batch_size": 1000,
        "ema": 0.5,
    } | changes


@pytest.fixture
def pruned(tmp_path):
    """A plan on disk beside the dense weights that it was made of."""
    torch.manual_seed(0)
    net = timm.create_model("nat_mini", **MICRO)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    p = plan(net, "dimap", 0.5, img_size=28)
    p.save(tmp_path / "plan.json")
    return p


def test_what_was_zeroed_stays_zero_and_the_rest_learns(pruned, tmp_path):
    hooks = ({"type": HOOK, "plan": str(tmp_path / "plan.json")},)
    done = train(recipe(tmp_path, hooks=hooks), work_dir=tmp_path / "run")
    before = torch.load(tmp_path / "weights.pth", weights_only=True)
    averaged = net_weights(read_checkpoint(done.last_checkpoint))
    for name, mask in pruned.masks.items():
        assert not averaged[name][~mask].any()
        assert (averaged[name] != before[name])[mask].float().mean() > 0.9


def test_a_plan_is_applied_again_to_weights_that_were_loaded_after_it(pruned, tmp_path):
    net = timm.create_model("nat_mini", **MICRO)
    dense = torch.load(tmp_path / "weights.pth", weights_only=True)
    net.load_state_dict(dense)
    hook, runner = KeepMasks(str(tmp_path / "plan.json")), SimpleNamespace(model=net)
    hook.before_run(runner)
    net.load_state_dict(dense)  # as resuming does, between the two
    assert all(net.get_parameter(name)[~mask].any() for name, mask in pruned.masks.items())
    hook.before_train(runner)
    assert not any(net.get_parameter(name)[~mask].any() for name, mask in pruned.masks.items())
    assert all((net.get_parameter(name) == dense[name])[mask].all() for name, mask in pruned.masks.items())


def test_without_the_hook_they_would_grow_back(pruned, tmp_path):
    pruned_weights = pruned.masked(torch.load(tmp_path / "weights.pth", weights_only=True))
    torch.save(pruned_weights, tmp_path / "weights.pth")
    done = train(recipe(tmp_path), work_dir=tmp_path / "run")
    weights = net_weights(read_checkpoint(done.last_checkpoint))
    assert all(weights[name][~mask].any() for name, mask in pruned.masks.items())


def test_a_plan_of_another_model_stops_the_run(pruned, tmp_path):
    other = plan(timm.create_model("nat_mini", **MICRO | {"dims": (16, 48)}), "dimap", 0.5, img_size=28)
    other.save(tmp_path / "other.json")
    hooks = ({"type": HOOK, "plan": str(tmp_path / "other.json")},)
    with pytest.raises(PruningError, match="the plan is for Nat"):
        train(recipe(tmp_path, hooks=hooks), work_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"type": HOOK, "plan": "none.json"}, "cannot build 'KeepMasks': plan none.json"),
        ({"type": "NoSuchHook"}, "no hook is registered as 'NoSuchHook'"),
        ({}, "no hook is registered as None"),
    ],
)
def test_a_hook_that_cannot_be_built_is_refused_before_anything_is_written(hook, message, pruned, tmp_path):
    with pytest.raises(TrainError, match=message):
        train(recipe(tmp_path, hooks=(hook,)), work_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_cut_net_is_tuned_from_its_folder_and_stays_narrow(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("nat_mini", **MICRO)
    smaller = plan(net, "dimap", 0.5, structure=["heads", "mlp"], img_size=28).cut(net)
    folder = save_hub(smaller, tmp_path / "cut")
    model = recipe(tmp_path)["model"] | {"checkpoint": str(folder / "model.safetensors")}
    changed = recipe(tmp_path, model=model | {"widths": str(folder / "config.json")})
    done = train(changed, work_dir=tmp_path / "run")
    (folder / "config.json").unlink()  # the checkpoint knows the widths by itself
    back = load_net(done.last_checkpoint)
    assert str(back) == str(smaller.eval())
    with pytest.raises(TrainError, match=r"model\.widths .* is not the config\.json of a pruned model"):
        train(changed, work_dir=tmp_path / "other")


SWIN = {"embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4), "in_chans": 1, "num_classes": 10, "img_size": 28}


@pytest.fixture
def cut_swin(tmp_path):
    """A pruned timm model (timm's families have no widths=), and a recipe's model section that names its folder."""
    torch.manual_seed(0)
    net = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
    smaller = plan(net, "dimap", 0.5, structure=["heads", "mlp"], img_size=28).cut(net)
    folder = save_hub(smaller, tmp_path / "cut")
    files = {"checkpoint": str(folder / "model.safetensors"), "widths": str(folder / "config.json")}
    return smaller, {"name": "swin_tiny_patch4_window7_224"} | SWIN | files


def test_a_cut_net_of_timm_is_tuned_from_its_folder_too(cut_swin, tmp_path):
    smaller, model = cut_swin
    done = train(recipe(tmp_path, model=model), work_dir=tmp_path / "run")
    assert str(load_net(done.last_checkpoint)) == str(smaller.eval())


def test_a_cut_net_of_another_model_is_refused(cut_swin, tmp_path):
    changed = recipe(tmp_path, model=cut_swin[1] | {"name": "swin_small_patch4_window7_224"})
    with pytest.raises(TrainError, match=r"model\.widths .* was cut from swin_tiny_\S+, not swin_small_"):
        train(changed, work_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
