"""Scores of weights, judged by the papers' formulas spelled out."""

import pytest
import torch
from torch import Tensor, nn

from foveate.pruning import PruningError, group_of_weights, plan
from foveate.pruning.criteria import share_of_larger, taylor_scores, weight_scores


def by_the_formula(weight: Tensor) -> Tensor:
    """Equation 10 of DIMAP (and LAMP's score), one weight after the other."""
    squares = [float(w) ** 2 for w in weight.double().flatten()]
    scores = [s / sum(t for t in squares if t >= s) if s else 0.0 for s in squares]
    return torch.tensor(scores, dtype=torch.float64).view(weight.shape)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(7, 11, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[3.0, -3.0, 1.0], [0.0, 3.0, -1.0]]),  # ties and a zero
        torch.zeros(2, 3),
        torch.tensor([[1e-30, 1.0], [1e4, 1e-4]]),  # float32 would lose the small ones
    ],
)
def test_the_dimap_score_is_the_papers_formula(weight):
    torch.testing.assert_close(share_of_larger(weight), by_the_formula(weight), rtol=1e-12, atol=0)


def test_the_largest_weight_of_a_layer_scores_one():
    assert share_of_larger(torch.randn(50, 20)).max() == 1


def test_the_score_does_not_see_the_scale_of_a_layer():
    weight = torch.randn(40, 30)
    torch.testing.assert_close(share_of_larger(weight), share_of_larger(1e-3 * weight), rtol=1e-5, atol=0)


def test_taylor_is_the_squared_product_of_weight_and_gradient():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).train()
    batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(2)]
    wanted = torch.zeros(3, 4)
    for images, targets in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), targets).backward()
        wanted += (model.weight * model.weight.grad).detach() ** 2 / 2
    model.zero_grad()
    got = taylor_scores(model, ["weight"], batches)["weight"]
    torch.testing.assert_close(got, wanted.double(), rtol=1e-5, atol=1e-12)
    assert (model.training and model.weight.grad is None) or not model.weight.grad.any()


def test_scoring_gives_every_module_its_own_mode_back():
    """A BatchNorm that was frozen in a model that trains stays frozen."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    model[1].eval()
    taylor_scores(model, ["0.weight"], [(torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0]))])
    assert [module.training for module in model] == [True, False, True]


def test_taylor_without_data_is_refused():
    with pytest.raises(PruningError, match="got none"):
        taylor_scores(nn.Linear(2, 2), ["weight"], [])


def batches(px: int = 40) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(3, 3, px, px, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2]))]


@pytest.mark.parametrize("structure", [(), ("mlp",), ("heads", "mlp"), ("channels",)], ids=str)
def test_taylor_leaves_frozen_layers_as_they_are_and_works_on_the_rest(structure, small):
    net = small("nat_mini")
    net.stages[0].requires_grad_(False)
    p = plan(net, "taylor", 0.5, structure=structure, batches=batches(), img_size=40)
    assert p.masks and not any(name.startswith("stages.0.") for name in (*p.masks, *p.cuts))
    assert not any(q.requires_grad for q in net.stages[0].parameters())
    assert all(q.requires_grad for q in net.stages[1].parameters())


@pytest.mark.parametrize("structure", [(), ("mlp",)], ids=str)
def test_taylor_with_every_weight_frozen_is_refused_in_one_line(structure, small):
    net = small("nat_mini").requires_grad_(False)
    with pytest.raises(PruningError, match="taylor: all of the weights are frozen"):
        plan(net, "taylor", 0.5, structure=structure, batches=batches(), img_size=40)


def test_taylor_of_a_model_that_records_no_gradients_is_refused_in_one_line(small):
    net = small("nat_mini")
    net.forward = torch.no_grad()(net.forward)
    with pytest.raises(PruningError, match="taylor: no gradients of Nat: element 0 of tensors does not require grad"):
        plan(net, "taylor", 0.5, batches=batches(), img_size=40)


def test_taylor_scores_a_weight_that_takes_no_part_as_nothing(small):
    net = small("nat_mini")
    net.stages[1].blocks[0].forward = lambda x: x
    scores = weight_scores(net, group_of_weights(net), "taylor", batches=batches())
    assert not scores["stages.1.blocks.0.mlp.fc1.weight"].any() and scores["stages.1.blocks.1.mlp.fc1.weight"].all()
