"""Scores of weights, judged by the papers' formulas spelled out."""

import pytest
import torch
from torch import Tensor, nn

from foveate.pruning import PruningError
from foveate.pruning.criteria import share_of_larger, taylor_scores


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


def test_taylor_without_data_is_refused():
    with pytest.raises(PruningError, match="got none"):
        taylor_scores(nn.Linear(2, 2), ["weight"], [])
