"""Averaged weights equal a loop written by hand, and the better of raw and averaged weights is kept."""

import pytest
import torch

from foveate.train import evaluate, load_net, load_recipe, read_scalars, train
from foveate.train.average import raw_weights
from foveate.train.checkpoints import net_weights, read_checkpoint
from foveate.train.data import build_loaders
from foveate.train.images import seed_everything
from foveate.train.model import Classifier, build_net
from foveate.train.optim import build_optimizer, lr_at

EPOCHS, DECAY = 3, 0.7


def by_hand(recipe, accumulate: int, warmup: bool) -> tuple[dict, dict]:
    """Return raw and averaged state dicts after a plain loop: 6 batches an epoch, one average after each step."""
    recipe = load_recipe(recipe)
    seed_everything(recipe.seed)
    model = Classifier(recipe, build_net(recipe)).train()
    loader, _, _ = build_loaders(recipe)
    optimizer = build_optimizer(model.net, recipe.optimizer)
    average: dict[str, torch.Tensor] = {}
    steps = 0
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # ours
        for number, batch in enumerate(loader):
            group = min(accumulate, 6 - number + number % accumulate)  # the last group of an epoch may be smaller
            images, targets = model.data_preprocessor(batch, True)
            (model(images, targets, "loss")["loss"] / group).backward()
            if (number + 1) % accumulate and number + 1 < 6:
                continue
            for options in optimizer.param_groups:
                first = number - number % accumulate
                options["lr"] = lr_at(epoch + first / 6, recipe.schedule, recipe.optimizer.lr)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            grown = 1 - steps ** (-2 / 3) if warmup else DECAY
            decay = 0.0 if steps == 1 else min(DECAY, grown)
            for name, value in model.state_dict().items():
                if value.is_floating_point() and steps > 1:
                    average[name] = average[name] * decay + value * (1 - decay)
                else:
                    average[name] = value.clone()
    return model.state_dict(), average


@pytest.mark.parametrize(
    ("accumulate", "warmup"), [(1, True), (3, True), (4, False)], ids=["every batch", "3 batches", "no warmup"]
)
def test_averages_equal_a_loop_by_hand(make_recipe, tmp_path, accumulate, warmup):
    more = {} if warmup else {"ema_warmup": False}
    recipe = make_recipe(accumulate=accumulate, schedule={"epochs": EPOCHS}, ema=DECAY, **more)
    raw, average = by_hand(recipe, accumulate, warmup)
    saved = read_checkpoint(train(recipe, work_dir=tmp_path).last_checkpoint)
    assert saved["ema_state_dict"]["steps"] == EPOCHS * -(-6 // accumulate)
    torch.testing.assert_close(raw_weights(saved), raw, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(saved["state_dict"], average, rtol=1e-4, atol=1e-6)


SLOW_AVERAGE = {"ema": 0.99999, "ema_warmup": False, "schedule": {"epochs": 4}, "optimizer": {"lr": 3e-3}}
LEARNER = {"name": "nat_mini", "dims": (32,), "depths": (1,), "kernel_size": 3}


def test_the_better_weights_are_kept_and_named_where_the_averages_lag(make_recipe, tmp_path):
    """Without the warm-up, so slow an average is nearly the first step's weights."""
    result = train(make_recipe(model=LEARNER, **SLOW_AVERAGE), work_dir=tmp_path)
    lines = read_scalars(result.log)
    assert all({"raw_top1", "raw_top5", "raw_loss", "val_top1"} <= line.keys() for line in lines)
    assert lines[-1]["raw_loss"] < lines[-1]["val_loss"]
    best = read_checkpoint(result.best_checkpoint)
    assert result.best_top1 == max(line["raw_top1"] for line in lines) > max(line["val_top1"] for line in lines)
    assert (best["meta"]["best"]["weights"], best["meta"]["weights"], result.best_weights) == ("raw", "raw", "raw")
    assert evaluate(result.best_checkpoint).top1 == pytest.approx(result.best_top1)
    assert load_net(result.best_checkpoint)(torch.randn(1, 3, 16, 16)).shape == (1, 3)


def test_averages_that_are_better_are_kept_and_named(make_recipe, tmp_path, monkeypatch):
    from foveate.train import saving

    improves = saving.SaveCheckpoints._improves
    better = lambda self, epoch, metrics: improves(self, epoch, metrics | {"raw_top1": metrics["top1"] - 1})  # noqa: E731
    monkeypatch.setattr(saving.SaveCheckpoints, "_improves", better)
    result = train(make_recipe(ema=0.5, schedule={"epochs": 1}), work_dir=tmp_path)
    best, last = read_checkpoint(result.best_checkpoint), read_checkpoint(result.last_checkpoint)
    assert best["meta"]["best"]["weights"] == best["meta"]["weights"] == "averaged"
    assert all(map(torch.equal, net_weights(best).values(), net_weights(last).values()))


def test_the_warmup_lets_the_averages_of_a_short_run_learn(make_recipe, tmp_path):
    """With each of 20 seeds the loss of the averages was below 0.75 of that without the warm-up."""
    losses = [
        read_scalars(train(make_recipe(model=LEARNER, **SLOW_AVERAGE | more), work_dir=tmp_path / str(more)).log)[-1]
        for more in ({}, {"ema_warmup": True})
    ]
    assert losses[0]["train_loss"] == losses[1]["train_loss"] and losses[1]["val_loss"] < 0.9 * losses[0]["val_loss"]
