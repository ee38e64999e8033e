"""Train a `dcal` model with a loss of each of its branches, in learned proportions. A recipe names the hook:

from foveate.train.dcal import DcalLosses

hooks = [dict(type=DcalLosses)]

Weights    Kendall, Gal, Cipolla 2018, arXiv:1705.07115, in the form of Zhang et al. 2020, arXiv:2004.01888 (FairMOT):
           half the sum of exp(-w) * loss + w over the branches.
"""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..backbones.dcal import BRANCHES, Dcal
from .errors import TrainError
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
            raise TrainError("DcalLosses: the model did not run in training mode on this batch")
        total = logits.new_zeros(())
        for name, weight in zip(BRANCHES, net.loss_weights.float(), strict=True):
            total = total + 0.5 * ((-weight).exp() * self.loss(kept[name].float(), targets) + weight)
        return total


@HOOKS.register_module()
class DcalLosses(Hook):
    """Let training use the losses of all branches of a `dcal` model, pairs of images included.

    Raises:
        TrainError: (at the start of training) the model is not `dcal`.
    """

    def before_train(self, runner: Runner) -> None:
        classifier = unwrapped(runner.model)
        net = getattr(classifier, "net", None)
        if not isinstance(net, Dcal):
            raise TrainError(f"hooks: DcalLosses wants model.name dcal, got {type(net).__name__}")
        net.keeps_branches = True
        if not isinstance(classifier.loss, BranchLosses):
            classifier.loss = BranchLosses(net, classifier.loss)

    def after_train(self, runner: Runner) -> None:
        classifier = unwrapped(runner.model)
        classifier.net.keeps_branches, classifier.net.branch_logits = False, {}
        if isinstance(classifier.loss, BranchLosses):
            classifier.loss = classifier.loss.loss
