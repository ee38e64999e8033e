"""What an epoch draws follows from the seed, the epoch and the process, and from nothing else."""

import random
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from foveate.train import hooks
from foveate.train.hooks import Ema, SeedEpoch


def draws(seed: int, epoch: int, rank: int) -> tuple[float, ...]:
    counts = []
    wrapper = SimpleNamespace(initialize_count_status=lambda *count: counts.append(count))
    runner = SimpleNamespace(epoch=epoch, rank=rank, optim_wrapper=wrapper, model=None, train_dataloader=range(6))
    SeedEpoch(seed).before_train_epoch(runner)
    assert counts == [(None, 0, 6)]
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_same_epoch_draws_the_same_numbers():
    assert draws(1, 2, 3) == draws(1, 2, 3)


def test_another_seed_epoch_or_process_draws_others_from_every_generator():
    runs = [draws(0, 0, 0), draws(1, 0, 0), draws(0, 1, 0), draws(0, 0, 1), draws(0, 2, 0)]
    assert all(len(set(numbers)) == len(runs) for numbers in zip(*runs, strict=True))


def started(decay: float) -> tuple[Ema, nn.Module, SimpleNamespace]:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    runner = SimpleNamespace(model=net, iter=0, epoch=0)
    ema = Ema(decay, accumulate=1)
    ema.before_run(runner)
    ema.after_train_iter(runner, 0)  # the first update takes the values as they are
    return ema, net, runner


def test_statistics_of_batchnorm_are_averaged_as_weights_are():
    ema, net, runner = started(decay=0.75)
    norm = net[1]
    norm.running_mean.fill_(4.0)
    norm.running_var.fill_(9.0)
    norm.weight.data.fill_(5.0)
    ema.after_train_iter(runner, 1)
    average = ema.ema_model.module[1]
    assert average.running_mean.tolist() == [1.0, 1.0]  # 0.75 * 0 + 0.25 * 4
    assert average.running_var.tolist() == [3.0, 3.0]  # 0.75 * 1 + 0.25 * 9
    assert average.weight.tolist() == [2.0, 2.0]  # 0.75 * 1 + 0.25 * 5


def test_averaged_statistics_become_those_of_all_processes_after_an_epoch(monkeypatch):
    ema, _, runner = started(decay=0.75)
    seen = []
    monkeypatch.setattr(hooks, "all_reduce_params", lambda params, op: seen.append((list(params), op)))
    ema.after_train_epoch(runner)
    ((reduced, op),) = seen
    assert op == "mean"
    assert [id(t) for t in reduced] == [id(t) for t in ema.ema_model.module.buffers()]
    assert len(reduced) == 3  # mean, variance and count of one BatchNorm
