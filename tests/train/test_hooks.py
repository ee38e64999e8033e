"""What a step draws follows from the seed, the epoch, the batch and the process, and from nothing else."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from foveate.train import TrainError, average, train
from foveate.train.average import Ema
from foveate.train.hooks import Seeds


def draws(seed: int, epoch: int, batch: int, rank: int) -> tuple[float, ...]:
    counts = []
    wrapper = SimpleNamespace(initialize_count_status=lambda *count: counts.append(count))
    runner = SimpleNamespace(epoch=epoch, rank=rank, optim_wrapper=wrapper, model=None, train_dataloader=range(6))
    runner.train_loop = SimpleNamespace(batch=2)
    hook = Seeds(seed)
    hook.before_train_epoch(runner)
    assert counts == [(None, 2, 6)]
    hook.before_train_iter(runner, batch)
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_same_step_draws_the_same_numbers():
    assert draws(1, 2, 3, 4) == draws(1, 2, 3, 4)


def test_another_seed_epoch_batch_or_process_draws_others_from_every_generator():
    runs = [draws(*numbers) for numbers in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))]
    assert all(len(set(numbers)) == len(runs) for numbers in zip(*runs, strict=True))


def started(decay: float) -> tuple[Ema, nn.Module, SimpleNamespace]:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    runner = SimpleNamespace(model=net, optim_wrapper=SimpleNamespace(stepped=True))
    ema = Ema(net, decay, warmup=False)
    ema.after_train_iter(runner, 0)  # the first update takes the values as they are
    return ema, net, runner


def test_statistics_of_batchnorm_are_averaged_as_weights_are():
    ema, net, runner = started(decay=0.75)
    norm = net[1]
    norm.running_mean.fill_(4.0)
    norm.running_var.fill_(9.0)
    norm.weight.data.fill_(5.0)
    ema.after_train_iter(runner, 1)
    averaged = ema.average.module[1]
    assert averaged.running_mean.tolist() == [1.0, 1.0]  # 0.75 * 0 + 0.25 * 4
    assert averaged.running_var.tolist() == [3.0, 3.0]  # 0.75 * 1 + 0.25 * 9
    assert averaged.weight.tolist() == [2.0, 2.0]  # 0.75 * 1 + 0.25 * 5


def test_nothing_is_averaged_where_no_step_was_made():
    ema, net, runner = started(decay=0.75)
    runner.optim_wrapper.stepped = False
    net[1].weight.data.fill_(5.0)
    ema.after_train_iter(runner, 1)
    assert ema.average.module[1].weight.tolist() == [1.0, 1.0] and ema.steps == 1


def test_averaged_statistics_become_those_of_all_processes_after_an_epoch(monkeypatch):
    ema, _, runner = started(decay=0.75)
    seen = []
    monkeypatch.setattr(average, "all_reduce_params", lambda params, op: seen.append((list(params), op)))
    ema.after_train_epoch(runner)
    ((reduced, op),) = seen
    assert op == "mean"
    assert [id(t) for t in reduced] == [id(t) for t in ema.average.module.buffers()]
    assert len(reduced) == 3  # mean, variance and count of one BatchNorm


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"type": "EMAHook", "bogus": 1}, "hooks: EMAHook cannot start: TypeError: .*bogus"),
        ({"type": "LoggerHook", "interval": "x"}, "hooks: cannot build 'LoggerHook'"),
        ({"type": "EarlyStoppingHook"}, "hooks: cannot build 'EarlyStoppingHook'"),
        (
            {"type": "ProfilerHook", "by_epoch": True, "profile_times": 99},
            "hooks: cannot build .ProfilerHook.: Profiler will profile 0-99 epochs",
        ),
    ],
    ids=lambda part: str(part)[:30],
)
def test_wrong_arguments_of_a_hook_are_one_line_before_any_step(make_recipe, tmp_path, monkeypatch, hook, message):
    monkeypatch.setattr("foveate.train.loop.EpochLoop.run_epoch", lambda self: pytest.fail("trained"))
    with pytest.raises(TrainError, match=message) as error:
        train(make_recipe(hooks=(hook,)), work_dir=tmp_path / "run")
    assert "\n" not in str(error.value)
