"""A loss or gradient that is not finite is noticed in its step, with step, files and layer; fp16 skips such steps."""

import math

import pytest
import torch
from torch import nn

from foveate.train import DivergedError, load_recipe, read_scalars, train
from foveate.train.checkpoints import read_checkpoint
from foveate.train.optim import build_optim_wrapper
from foveate.train.stepper import _MOST_SKIPPED, NotFiniteError, Stepper
from foveate.train.together import Flags


def spoil(monkeypatch, number: int, value: float, row: slice, where: str = "layer2") -> None:
    """Let a layer of test_resnet return a value in training batch `number` (from 0), and in a second pass over it."""
    from foveate.train import loop, model

    state = {"batch": -1}
    run_iter, logits = loop.EpochLoop.run_iter, model.Classifier.logits

    def counted(self, idx, data_batch):
        state["batch"] += 1
        run_iter(self, idx, data_batch)

    def spoiled(self, images):
        def hook(module, args, output):
            output = output.clone()
            output[row] = value
            return output

        if not self.training or state["batch"] != number:
            return logits(self, images)
        handle = self.net.get_submodule(where).register_forward_hook(hook, prepend=True)
        try:
            return logits(self, images)
        finally:
            handle.remove()

    monkeypatch.setattr(loop.EpochLoop, "run_iter", counted)
    monkeypatch.setattr(model.Classifier, "logits", spoiled)


@pytest.mark.parametrize(("value", "said"), [(math.nan, "nan"), (math.inf, "nan")])
def test_a_loss_that_is_not_finite_is_noticed_in_its_step_with_file_and_layer(
    make_recipe, tmp_path, monkeypatch, value, said
):
    spoil(monkeypatch, number=8, value=value, row=slice(2, 3))
    with pytest.raises(
        DivergedError, match=rf"step 9 \(epoch 2, batch 3\): the loss is {said}, first in layer2"
    ) as error:
        train(make_recipe(model={"name": "test_resnet"}), work_dir=tmp_path)
    text = str(error.value)
    assert text.count(".png") >= 1 and "\n" not in text and "optimizer.lr" in text
    saved = read_checkpoint(tmp_path / "epoch_1.pth")
    assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values())
    assert [line["epoch"] for line in read_scalars(tmp_path / "scalars.jsonl")] == [1]


def test_the_file_is_that_of_the_row_where_images_do_not_mix(make_recipe, tmp_path, monkeypatch):
    spoil(monkeypatch, number=3, value=math.nan, row=slice(1, 2), where="fc")
    names = []
    from foveate.train import loop

    run_iter = loop.EpochLoop.run_iter
    monkeypatch.setattr(
        loop.EpochLoop,
        "run_iter",
        lambda self, i, batch: (names.append([self._name(k) for k in batch.indices]), run_iter(self, i, batch)),
    )
    with pytest.raises(DivergedError) as error:
        train(make_recipe(), work_dir=tmp_path)
    assert f"first in fc; files {names[3][1]}. Lower" in str(error.value)


def test_an_earlier_batch_of_the_step_is_found_under_accumulation(make_recipe, tmp_path, monkeypatch):
    spoil(monkeypatch, number=1, value=math.nan, row=slice(0, 1))
    with pytest.raises(DivergedError, match=r"step 3 \(epoch 1, batch 3\): the loss is nan") as error:
        train(make_recipe(accumulate=3), work_dir=tmp_path)
    assert not list(tmp_path.glob("*.pth")) and "files " in str(error.value)


def test_weights_that_overflowed_are_named(make_recipe, tmp_path):
    with pytest.raises(DivergedError, match=r"step 2 \(epoch 1, batch 2\): .*, first in \S+") as error:
        train(make_recipe(optimizer={"lr": 1e38, "opt": "sgd"}), work_dir=tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.pth"))


class Root(nn.Module):
    """Its gradient at 0 is infinite, its value is not."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) + torch.zeros_like(self.net.fc.bias).mul(self.net.fc.bias * 0).sqrt()


def test_a_gradient_that_is_not_finite_is_noticed_before_the_weights_change(make_recipe, tmp_path, monkeypatch):
    from foveate.train import prepare

    build = prepare.build_net

    def built(*args):
        net = build(*args)
        net.fc.register_forward_hook(lambda module, args, out: out + (module.bias * 0).sqrt())
        return net

    monkeypatch.setattr(prepare, "build_net", built)
    with pytest.raises(DivergedError, match=r"step 1 .*: the gradient norm is nan, first in the gradient of fc.bias"):
        train(make_recipe(), work_dir=tmp_path)


def scaled(net: nn.Module) -> Stepper:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return Stepper(optimizer, Flags(), clip=1.0, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16))


def test_fp16_skips_a_step_and_goes_on(monkeypatch):
    """On the CPU's gradient scaler, which is that of GPUs."""
    net = nn.Linear(3, 1)
    wrapper = scaled(net)
    before = net.weight.detach().clone()
    wrapper.update_params(net(torch.full((2, 3), math.inf)).sum())
    assert torch.equal(net.weight, before) and (wrapper.stepped, wrapper.ended) == (False, True)
    assert wrapper.state_dict()["loss_scaler"]["scale"] == 2.0**15 and wrapper.skipped_in_a_row == 1
    wrapper.update_params(net(torch.ones(2, 3)).sum())
    assert not torch.equal(net.weight, before) and wrapper.stepped and wrapper.skipped_in_a_row == 0
    assert (net.weight - before).norm() <= 0.1 * 1.0001  # clipped to norm 1 at rate 0.1, after unscaling


def test_fp16_that_skips_every_step_ends_the_run():
    net = nn.Linear(3, 1)
    wrapper = scaled(net)
    for _ in range(_MOST_SKIPPED):
        wrapper.update_params(net(torch.full((2, 3), math.nan)).sum())
    with pytest.raises(NotFiniteError):
        wrapper.update_params(net(torch.full((2, 3), math.nan)).sum())


def test_skipped_steps_are_counted_and_leave_the_mean_loss_finite(make_recipe, tmp_path, monkeypatch):
    from foveate.train import runner

    def with_scaler(net, recipe, flags):
        wrapper = build_optim_wrapper(net, recipe, flags)
        wrapper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        return wrapper

    monkeypatch.setattr(runner, "build_optim_wrapper", with_scaler)
    spoil(monkeypatch, number=2, value=math.inf, row=slice(0, 1))
    result = train(make_recipe(ema=0.5), work_dir=tmp_path)
    first, second = read_scalars(result.log)
    assert first["skipped_steps"] == 1 and "skipped_steps" not in second
    assert math.isfinite(first["train_loss"]) and first["iter"] == 6
    saved = read_checkpoint(result.last_checkpoint)
    assert saved["ema_state_dict"]["steps"] == 11  # a skipped step is not averaged
    assert saved["optimizer"]["loss_scaler"]["scale"] == 2.0**7


def test_the_gradient_norm_is_recorded(make_recipe, tmp_path):
    plain, scaled_loss = (
        read_scalars(train(make_recipe(**more, schedule={"epochs": 1}), work_dir=tmp_path / str(len(more))).log)[0]
        for more in ({}, {"augment": {"smoothing": 0.9}})
    )
    assert plain["grad_norm"] > scaled_loss["grad_norm"] > 0
    assert load_recipe(tmp_path / "0" / "recipe.py").augment.smoothing == 0
