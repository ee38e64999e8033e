"""Head importance: one head at a time falls silent, and what that changes is measured."""

import copy

import pytest
import torch
import torch.nn.functional as F

from foveate.pruning import PruningError, plan
from foveate.pruning.heads import head_importance
from foveate.pruning.structured import masks_of
from foveate.pruning.structures import find_structures


@pytest.fixture(scope="module")
def batches(images):
    x = images("nat_mini")
    return [(x, torch.tensor([1, 4])), (x.flip(0) * 0.5, torch.tensor([2, 0]))]


@pytest.mark.parametrize("name", ["nat_mini", "litv2_small", "fv_halonet_h0", "swin_tiny_patch4_window7_224"])
def test_silencing_a_head_is_what_cutting_it_does(name, small, images):
    net = small(name).double()
    x, targets = images(name).double(), torch.tensor([1, 4])
    found = head_importance(net, [(x, targets)])
    modules = list(dict.fromkeys(h.module for h in found))
    assert len(found) > len(modules) > 0
    one = next(h for h in found if sum(other.module == h.module for other in found) > 1)
    masked = without_head(net, one.module, one.head)
    with torch.no_grad():
        full, less = net(x).log_softmax(-1), masked(x).log_softmax(-1)
    named = full.argmax(1)
    assert one.loss_change == pytest.approx(float(F.nll_loss(less, targets) - F.nll_loss(full, targets)), abs=1e-5)
    wanted = (full.exp() * (full - less)).sum(1).mean()
    assert one.divergence == pytest.approx(float(wanted), abs=1e-6) and one.divergence > 0
    change = (less.exp() - full.exp()).gather(1, named[:, None]).mean()
    assert one.confidence_change == pytest.approx(float(change), abs=1e-6)


def without_head(net, module, head):
    """The model with every slice of one head zeroed."""
    layer = next(s for s in find_structures(net, ["heads"], {}) if s.name == module)
    tensors = net.state_dict()
    cuts = {}
    for part in layer.slices:
        kept = torch.ones(tensors[part.tensor].shape[part.axis], dtype=torch.bool)
        kept[part.index[head]] = False
        cuts.setdefault(part.tensor, {})[part.axis] = kept.nonzero().flatten()
    masked = copy.deepcopy(net)
    with torch.no_grad():
        for name, mask in masks_of(net, cuts).items():
            masked.get_parameter(name).masked_fill_(~mask, 0)
    return masked


def test_measuring_leaves_the_net_as_it_is(small, batches):
    net = small("nat_mini").train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    head_importance(net, batches)
    assert net.training and all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_means_are_over_all_images(small, batches):
    net = small("nat_mini")
    each = [head_importance(net, [batch]) for batch in batches]
    both = head_importance(net, batches)
    for a, b, mean in zip(*each, both, strict=True):
        assert mean.divergence == pytest.approx((a.divergence + b.divergence) / 2, rel=1e-5)


def test_plans_by_head_importance_drop_the_heads_that_matter_least(small, batches):
    net = small("nat_mini")
    p = plan(net, "head_importance", 0.5, structure=["heads"], scope="layer", batches=batches, img_size=40)
    found = [h for h in head_importance(net, batches) if h.module == "stages.1.blocks.0.attn"]
    weakest = {h.head for h in sorted(found, key=lambda h: h.divergence)[:4]}
    kept = set(p.cuts["stages.1.blocks.0.attn.rpb"][0].tolist())
    assert kept == set(range(8)) - weakest


def test_a_net_without_heads_or_data_is_refused(small, batches):
    with pytest.raises(PruningError, match="has none that can be cut"):
        head_importance(small("van_b0"), batches)
    with pytest.raises(PruningError, match="got none"):
        head_importance(small("nat_mini"), [])


def test_taylor_plans_single_weights_and_structures(small, batches):
    net = small("nat_mini")
    p = plan(net, "taylor", 0.5, batches=batches, img_size=40)
    assert sum(int(m.sum()) for m in p.masks.values()) == pytest.approx(
        sum(m.numel() for m in p.masks.values()) / 2, abs=1
    )
    other = plan(net, "taylor", 0.5, batches=batches[:1], img_size=40)
    assert any(not torch.equal(p.masks[n], other.masks[n]) for n in p.masks)  # the data decide
    cut = plan(net, "taylor", 0.5, structure=["heads", "mlp"], batches=batches, img_size=40)
    assert cut.removed == {"heads": (10, 20), "mlp": (240, 480)}
