"""The key loss.branches, which trains the branches of a `dcal` model."""

import json
import math
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from foveate.train import read_scalars, train
from foveate.train.checkpoints import net_weights, read_checkpoint
from foveate.train.dcal import BranchLosses, DcalLosses
from foveate.train.errors import TrainError
from foveate.train.model import Classifier, build_net
from foveate.train.recipe import read_recipe

VIT = {"of": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


def classifier(make_recipe, **model):
    recipe = read_recipe(make_recipe(model={"name": "dcal", **VIT, **model}))
    torch.manual_seed(0)
    return Classifier(recipe, build_net(recipe))


def test_the_loss_is_the_weighted_sum_over_the_branches(make_recipe):
    model = classifier(make_recipe)
    DcalLosses().before_train(SimpleNamespace(model=model))
    images, targets = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        model.net.loss_weights.copy_(torch.tensor([0.5, 0.0, -1.0]))
    torch.manual_seed(1)
    model.train()
    logits = model.net(images)
    kept, expected = dict(model.net.branch_logits), 0.0
    for weight, name in zip((0.5, 0.0, -1.0), ("sa", "glca", "pwca"), strict=True):
        expected += 0.5 * (math.exp(-weight) * nn.functional.cross_entropy(kept[name], targets) + weight)
    loss = model.loss(logits, targets)
    torch.testing.assert_close(loss, torch.as_tensor(expected))
    loss.backward()
    idle = [name for name, p in model.net.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in idle if "k_proj.bias" not in name] == []  # softmax does not see it


def test_the_hook_restores_the_model_and_adds_no_weights(make_recipe):
    model = classifier(make_recipe)
    keys, plain = list(model.state_dict()), model.loss
    hook, runner = DcalLosses(), SimpleNamespace(model=model)
    hook.before_train(runner)
    assert isinstance(model.loss, BranchLosses) and list(model.state_dict()) == keys
    hook.before_train(runner)
    assert not isinstance(model.loss.loss, BranchLosses)
    hook.after_train(runner)
    assert model.loss is plain and not model.net.keeps_branches


def test_another_model_and_another_batch_are_refused(make_recipe, tmp_path):
    with pytest.raises(TrainError, match=r"loss.branches: wants model.name dcal, got test_resnet"):
        train(make_recipe(loss={"branches": True}), work_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    loss = BranchLosses(timm.create_model("dcal", **VIT, num_classes=3), nn.CrossEntropyLoss())
    with pytest.raises(TrainError, match="did not run in training mode on this batch"):
        loss(torch.zeros(2, 3), torch.tensor([0, 1]))


def test_a_recipe_in_json_trains_the_branches(make_recipe, tmp_path):
    losses = []
    for branches in (False, True):
        recipe = make_recipe(model={"name": "dcal", **VIT}, schedule={"epochs": 1}, loss={"branches": branches})
        path = tmp_path / f"{branches}.json"
        path.write_text(json.dumps(recipe))
        result = train(path, work_dir=tmp_path / str(branches))
        losses.append(read_scalars(result.log)[-1]["train_loss"])
        weights = net_weights(read_checkpoint(result.last_checkpoint))["loss_weights"]
        assert bool(weights.any()) == branches  # they begin at 0
    assert losses[0] != losses[1]
    again = train(tmp_path / "True.json", work_dir=tmp_path / "True", resume=True, cfg_options={"schedule.epochs": 2})
    assert again.epochs == 2
