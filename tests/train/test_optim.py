"""Learning rates and parameter groups."""

import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler

from foveate.train import TrainError, load_recipe
from foveate.train.optim import build_optim_wrapper, build_optimizer, lr_at
from foveate.train.recipe import OptimizerRecipe, ScheduleRecipe

COSINE = ScheduleRecipe(epochs=10, warmup_epochs=3, warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=2)


def test_cosine_with_warm_up_and_cool_down_is_timms():
    steps = 7  # an epoch
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = CosineLRScheduler(
        optimizer, t_initial=10 * steps, lr_min=1e-5, warmup_t=3 * steps, warmup_lr_init=1e-6, t_in_epochs=False
    )
    for update in range(12 * steps):
        theirs.step_update(update)
        assert lr_at(update / steps, COSINE, 1e-3) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


@pytest.mark.parametrize("delay", [0, 1])
def test_a_rate_per_epoch_is_that_of_timms_scripts(delay):
    """VAN's script steps with the number of the next epoch, BiFormer's with that of the finished one."""
    schedule = ScheduleRecipe(
        epochs=10, warmup_epochs=3, warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=2, per="epoch", delay_epochs=delay
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = CosineLRScheduler(optimizer, t_initial=10, lr_min=1e-5, warmup_t=3, warmup_lr_init=1e-6)
    for epoch in range(12):
        rate = optimizer.param_groups[0]["lr"]
        for batch in range(7):
            assert lr_at(epoch + batch / 7, schedule, 1e-3) == pytest.approx(rate, rel=1e-9)
        theirs.step(epoch + 1 - delay)
    if delay:
        assert lr_at(0, schedule, 1e-3) == lr_at(1.9, schedule, 1e-3) == 1e-6  # two epochs at the first rate


def test_a_constant_rate_does_not_decay():
    constant = ScheduleRecipe(epochs=10, kind="constant", warmup_epochs=2)
    assert [lr_at(epoch, constant, 1e-3) for epoch in (1, 2, 9.9, 12)] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])


def test_linear_goes_straight_from_the_first_rate_to_the_last():
    linear = ScheduleRecipe(epochs=10, kind="linear", min_lr=1e-4)
    rates = [lr_at(epoch, linear, 1e-3) for epoch in (0, 5, 10, 12)]
    assert rates == pytest.approx([1e-3, 5.5e-4, 1e-4, 1e-4])


def test_steps_multiply_the_rate_after_whole_periods_down_to_the_floor():
    steps = ScheduleRecipe(epochs=100, kind="step", step_epochs=30, step_rate=0.1, warmup_epochs=5, min_lr=1e-3)
    rates = [lr_at(epoch, steps, 0.1) for epoch in (2.5, 5, 29.9, 30, 59.9, 60, 99)]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])


@pytest.mark.parametrize("name", ["test_vit", "van_b0", "nat_mini"])
def test_one_dimensional_and_named_parameters_are_not_decayed(name):
    net = timm.create_model(name)
    optimizer = build_optimizer(net, OptimizerRecipe(lr=1e-3, weight_decay=0.05))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = net.no_weight_decay() if hasattr(net, "no_weight_decay") else set()
    wrong = [
        key
        for key, p in net.named_parameters()
        if (decay[id(p)] == 0) != (p.ndim <= 1 or key.endswith(".bias") or key in named)
    ]
    assert wrong == [] and len(decay) == len(list(net.parameters()))


def test_layer_decay_gives_early_layers_a_smaller_scale():
    optimizer = build_optimizer(timm.create_model("test_vit"), OptimizerRecipe(lr=1e-3, layer_decay=0.5))
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert max(scales) == 1.0 and min(scales) < 0.1


def test_a_pattern_gives_parameters_a_rate_of_their_own_and_leaves_their_decay():
    net = timm.create_model("litv2_small", depths=(1, 1, 1, 1), dims=(32, 64, 96, 128))
    mult = {"*.conv_offset.weight": 0.01, "head.*": 2.0}
    optimizer = build_optimizer(net, OptimizerRecipe(lr=1e-3, weight_decay=0.05, lr_mult=mult))
    plain = build_optimizer(net, OptimizerRecipe(lr=1e-3, weight_decay=0.05))
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == set(net.parameters())
    decay = {p: group["weight_decay"] for group in plain.param_groups for p in group["params"]}
    for name, p in net.named_parameters():
        factor = 0.01 if name.endswith("conv_offset.weight") else 2.0 if name.startswith("head.") else 1.0
        assert (groups[p]["lr_mult"], groups[p]["weight_decay"]) == (factor, decay[p]), name


def test_patterns_that_match_nothing_or_a_parameter_twice_are_refused():
    net = timm.create_model("test_resnet")
    with pytest.raises(TrainError, match=r"optimizer.lr_mult: 'conv1' matches no parameter"):  # a part of a name
        build_optimizer(net, OptimizerRecipe(lr=1e-3, lr_mult={"conv1": 0.1}))
    with pytest.raises(TrainError, match=r"optimizer.lr_mult: '\*bias' matches fc.bias, as another pattern does"):
        build_optimizer(net, OptimizerRecipe(lr=1e-3, lr_mult={"fc.*": 0.1, "*bias": 0.1}))


def test_named_parameters_are_decayed_too():
    net = timm.create_model("nat_mini", depths=(1, 1, 1, 1), dims=(32, 64, 96, 128))
    plain, tables, every = (
        build_optimizer(net, OptimizerRecipe(lr=1e-3, weight_decay=0.05, also_decay=patterns, lr_mult={"*.rpb": 0.5}))
        for patterns in ((), ("*.rpb",), ("*",))
    )
    for optimizer, decayed in (
        (plain, lambda n: False),
        (tables, lambda n: n.endswith(".rpb")),
        (every, lambda n: True),
    ):
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        assert groups.keys() == set(net.parameters())
        for name, p in net.named_parameters():
            usual = 0.0 if p.ndim <= 1 or name.endswith((".bias", ".rpb")) else 0.05
            assert groups[p]["weight_decay"] == (0.05 if decayed(name) else usual), name
            assert groups[p]["lr_mult"] == (0.5 if name.endswith(".rpb") else 1.0)


def test_decay_that_changes_nothing_is_refused():
    net = timm.create_model("test_resnet")
    for patterns, message in (
        (("conv1",), "optimizer.also_decay: 'conv1' matches no parameter"),
        (("fc.weight",), "optimizer.also_decay: 'fc.weight' matches parameters that have weight decay anyway"),
    ):
        with pytest.raises(TrainError, match=message):
            build_optimizer(net, OptimizerRecipe(lr=1e-3, weight_decay=0.05, also_decay=patterns))
    with pytest.raises(TrainError, match=r"optimizer.also_decay: has no effect without optimizer.weight_decay"):
        OptimizerRecipe(lr=1e-3, also_decay=("*",))


def test_every_optimizer_argument_reaches_the_optimizer():
    net = timm.create_model("test_resnet")
    adamw = build_optimizer(net, OptimizerRecipe(lr=1e-3, betas=(0.8, 0.9), eps=1e-6)).defaults
    assert (adamw["betas"], adamw["eps"]) == ((0.8, 0.9), 1e-6)
    sgd = build_optimizer(net, OptimizerRecipe(lr=1e-3, opt="sgd", momentum=0.5))
    assert type(sgd).__name__ == "SGD" and sgd.defaults["momentum"] == 0.5


def test_an_optimizer_that_does_not_exist_or_does_not_take_the_argument_is_refused():
    net = timm.create_model("test_resnet")
    with pytest.raises(TrainError, match=r"unknown optimizer 'adamv'; did you mean .*adam"):
        build_optimizer(net, OptimizerRecipe(lr=1e-3, opt="adamv"))
    with pytest.raises(TrainError, match=r"optimizer.betas: sgd does not have this argument, got \(0.9, 0.9\)"):
        build_optimizer(net, OptimizerRecipe(lr=1e-3, opt="sgd", betas=(0.9, 0.9)))


def test_adaptive_clipping_limits_each_unit_but_the_head(make_recipe):
    recipe = load_recipe(make_recipe(optimizer={"clip_grad": 0.01, "clip_mode": "agc"}))
    net = timm.create_model("test_resnet", num_classes=3)
    wrapper = build_optim_wrapper(net, recipe)
    wrapper.optimizer.step = lambda: None
    wrapper.optimizer.zero_grad = lambda: None
    loss = 1e3 * net(torch.randn(2, 3, 32, 32)).square().sum()
    before = torch.autograd.grad(loss, [net.fc.weight, net.conv1[0].weight], retain_graph=True)
    wrapper.update_params(loss)
    assert torch.equal(net.fc.weight.grad, before[0])
    weight, grad = net.conv1[0].weight, net.conv1[0].weight.grad
    norms = weight.flatten(1).norm(dim=1).clamp(min=1e-3)
    assert (grad.flatten(1).norm(dim=1) <= 0.0101 * norms).all() and grad.norm() < before[1].norm()


@pytest.mark.parametrize("mode", ["norm", "value"])
def test_gradients_are_clipped(make_recipe, mode):
    recipe = load_recipe(make_recipe(optimizer={"clip_grad": 0.1, "clip_mode": mode}))
    net = torch.nn.Linear(4, 4)
    wrapper = build_optim_wrapper(net, recipe)
    wrapper.optimizer.step = lambda: None
    wrapper.optimizer.zero_grad = lambda: None
    wrapper.update_params(1000 * net(torch.ones(2, 4)).sum())
    gradients = torch.cat([p.grad.flatten() for p in net.parameters()])
    size = gradients.norm() if mode == "norm" else gradients.abs().max()
    assert size == pytest.approx(0.1, rel=1e-4)
    assert wrapper.grad_norm > 1000 and wrapper.stepped  # the norm before clipping
