"""What an epoch draws follows from the seed, the epoch and the process, and from nothing else."""

import random
from types import SimpleNamespace

import numpy as np
import torch

from foveate.train.hooks import SeedEpoch


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
