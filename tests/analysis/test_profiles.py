"""Profiles of attention against recorded loops, and on the maps of models."""

import pytest
import torch
from small_models import KINDS, alive, small

from foveate.analysis import head_profiles, profile

FIELDS = {
    "strength_sum_per_hop": "strength_sum", "strength_mean_per_hop": "strength_mean", "mean_distance": "mean_distance",
    "patch_to_class": "patch_to_class", "class_to_class": "class_to_class", "entropy": "entropy",
}  # fmt: skip
X = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
ATTENDING = [name for name in KINDS if not name.startswith(("van", "eca", "ela", "ulsam"))]
# Whose keys may be no map of tokens.
NO_MAP = (
    *("channel_attention", "sparse_attention", "agent_attention", "dense_attention"),
    *("softmax", "scaled_dot_product_attention"),
)
# Rows that need not sum to 1: keys outside the map, clipped softmax, attention that is sent, weights without softmax,
# one of two kinds of keys.
NOT_WHOLE = ("halo", "dense_attention", "reversed", "flow", "cluster", "aggregated")


def test_profiles_equal_the_recorded_ones(det, golden):
    facts, arrays = golden("module__head_analysis")
    for name, case in facts["cases"].items():
        logits = torch.from_numpy(det.det_input(case["shape"], 31)).double()
        found = profile((2 * logits).softmax(-1), tuple(case["grid"]), prefix=1)
        for key, field in FIELDS.items():
            theirs = torch.from_numpy(arrays[f"{name}__{key}"]).double()
            torch.testing.assert_close(getattr(found, field), theirs, rtol=1e-6, atol=1e-8, msg=f"{name} {key}")


@pytest.mark.parametrize("name", ATTENDING)
def test_every_layer_of_every_family_has_a_profile(name):
    for one in head_profiles(alive(small(name)), X):
        found = one.profile
        assert found.entropy.shape[0] == 2 and (found.entropy >= -1e-9).all() and found.entropy.isfinite().all()
        if found.strength_sum is None:
            assert one.op in NO_MAP, one.op
            continue
        total = found.strength_sum.sum(-1) + (0 if found.patch_to_class is None else found.patch_to_class)
        assert (total <= 1 + 1e-6).all() and (total > 0).all()
        if not any(part in one.op for part in NOT_WHOLE):
            torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-6)
        assert found.mean_distance.isfinite().all() or one.op == "dense_attention"  # clipped: a head may see nothing


def test_fewer_queries_stand_for_all():
    model = alive(small("nat_mini"))
    (every,) = head_profiles(model, X, layers=["stages.0.blocks.0.attn"])
    (some,) = head_profiles(model, X, layers=["stages.0.blocks.0.attn"], most_queries=24)
    assert not torch.equal(every.profile.entropy, some.profile.entropy)
    torch.testing.assert_close(every.profile.entropy, some.profile.entropy, rtol=0.3, atol=0.1)
    (same,) = head_profiles(model, X, layers=["stages.0.blocks.0.attn"], most_queries=96)
    torch.testing.assert_close(every.profile.entropy, same.profile.entropy)


def test_neighborhoods_end_at_their_kernel():
    (first, *_) = head_profiles(alive(small("nat_mini")), X)
    strength = first.profile.strength_sum
    assert (strength[..., :3] > 0).all() and not strength[..., 3:].any()  # 3 x 3, clamped at the border


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"10 queries, 10 keys are not 1 \+ maps \(2, 4\), \(2, 4\)"):
        profile(torch.full((1, 1, 10, 10), 0.1), (2, 4), prefix=1)
    with pytest.raises(ValueError, match="most_queries must be at least 1, got 0"):
        head_profiles(alive(small("nat_mini")), X, most_queries=0)
