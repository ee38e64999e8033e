"""Train a `dcal` model with a loss of each of its branches, in learned proportions (`loss.branches` of a recipe).

Weights    Kendall, Gal, Cipolla 2018, arXiv:1705.07115, in the form of Zhang et al. 2020, arXiv:2004.01888 (FairMOT):
           half the sum of exp(-w) * loss + w over the branches.
"""

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from ..backbones.dcal import BRANCHES, Dcal
from .errors import TrainError
from .recipe import Recipe
from .together import unwrapped


class BranchLosses(nn.Module):
    """The losses of all branches of a model, weighted by its `loss_weights`.

    Args:
        net: the model; it must have run in training on the batch whose targets are given.
        loss: of the logits of one branch and the targets.
    """

    def __init__(self, net: Dcal, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self._net = (net,)  # no child: its weights are in the state dict already

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted sum, a scalar. `logits`, the model's output, must be of the same batch."""
        (net,) = self._net
        kept, net.branch_logits = net.branch_logits, {}
        if any(len(kept.get(name, ())) != len(logits) for name in BRANCHES):
            raise TrainError("loss.branches: the model did not run in training mode on this batch")
        total = logits.new_zeros(())
        for name, weight in zip(BRANCHES, net.loss_weights.float(), strict=True):
            total = total + 0.5 * ((-weight).exp() * self.loss(kept[name].float(), targets) + weight)
        return total


class DcalLosses(Hook):
    """Let training use the losses of all branches of a `dcal` model, pairs of images included."""

    def before_train(self, runner: Runner) -> None:
        classifier = unwrapped(runner.model)
        classifier.net.keeps_branches = True
        if not isinstance(classifier.loss, BranchLosses):
            classifier.loss = BranchLosses(classifier.net, classifier.loss)

    def after_train(self, runner: Runner) -> None:
        classifier = unwrapped(runner.model)
        classifier.net.keeps_branches, classifier.net.branch_logits = False, {}
        if isinstance(classifier.loss, BranchLosses):
            classifier.loss = classifier.loss.loss


def check_branches(net: nn.Module, recipe: Recipe) -> None:
    """Refuse the key for a model without branches.

    Raises:
        TrainError: loss.branches is set, and the model is not `dcal`.
    """
    if recipe.loss.branches and not isinstance(net, Dcal):
        raise TrainError(f"loss.branches: wants model.name dcal, got {recipe.model.name}")
