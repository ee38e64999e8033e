"""Effects of silenced heads against the recorded ones, and on every kind of attention."""

import pytest
import timm
import torch
from small_models import KINDS, alive, small

from foveate.analysis import head_effects

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([1, 3])
ATTENDING = [name for name in KINDS if not name.startswith(("van", "eca", "ela", "ulsam"))]
HEAVY = ("fv_halonet26t", "fv_sehalonet33ts", "fv_eca_halonext26ts", "fv_haloregnetz_b")
MEASURES = {
    "probability_drop": "probability_drop", "divergence": "jsd", "loss_increase": "loss_increase",
    "accuracy_drop": "accuracy_drop",
}  # fmt: skip


def test_effects_equal_the_recorded_ones(det, golden):
    facts, arrays = golden("module__head_analysis")
    recorded = facts["importance"]
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=10)
    model.load_state_dict(det.det_state_dict(recorded["state_dict"]))
    images = torch.from_numpy(det.det_input((4, 3, 64, 64), 5)).double()
    effects = head_effects(model.double(), [(images, torch.tensor(recorded["labels"]))])
    assert [(e.layer, e.head) for e in effects] == [(f"blocks.{i}.attn", h) for i in range(3) for h in range(3)]
    for ours, theirs in MEASURES.items():
        found = torch.tensor([getattr(e, ours) for e in effects], dtype=torch.float64).view(3, 3)
        expected = torch.from_numpy(arrays[f"importance__{theirs}"]).double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, msg=ours)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in ATTENDING])
def test_every_head_of_every_family_can_be_silenced(name):
    model = alive(small(name, num_classes=5))
    before = model(X)
    effects = head_effects(model, [(X, Y)])
    assert all(0 <= e.divergence <= 0.6932 for e in effects) and any(e.divergence > 1e-6 for e in effects)
    assert len({(e.layer, e.branch, e.head) for e in effects}) == len(effects)
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)


def test_silencing_equals_zeroed_columns_of_the_projection():
    model = alive(small("nat_mini", num_classes=5))
    effects = {(e.layer, e.head): e for e in head_effects(model, [(X, Y)], layers=["stages.1.blocks.0.attn"])}
    assert len(effects) == 2
    full = model(X).log_softmax(-1)
    with torch.no_grad():
        model.stages[1].blocks[0].attn.proj.weight[:, 32:] = 0  # head 1 of two
    without = model(X).log_softmax(-1)
    loss = (full - without).gather(1, Y[:, None]).mean().item()
    assert abs(effects["stages.1.blocks.0.attn", 1].loss_increase - loss) < 1e-5


def test_heads_that_share_an_axis_with_images_are_silenced_in_all_of_them():
    torch.manual_seed(0)
    sizes = {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 3, "window_size": 0, "global_attn_indexes": (0,)}
    model, x = timm.create_model("samvit_base_patch16_224", num_classes=5, **sizes).eval(), torch.randn(2, 3, 64, 64)
    effects = head_effects(model, [(x, Y)])
    assert [effect.head for effect in effects] == [0, 1, 2]
    full = model(x).log_softmax(-1)
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[:, 8:16] = 0  # head 1 of three
    without = model(x).log_softmax(-1)
    loss = (full - without).gather(1, Y[:, None]).mean().item()
    assert abs(effects[1].loss_increase - loss) < 1e-5


def test_two_batches_are_averaged_by_image():
    model = alive(small("nat_mini", num_classes=5))
    layer = ["stages.0.blocks.0.attn"]
    whole = head_effects(model, [(X, Y)], layer)[0]
    parts = head_effects(model, [(X[:1], Y[:1]), (X[1:], Y[1:])], layer)[0]
    assert abs(whole.loss_increase - parts.loss_increase) < 1e-5


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="wanted batches of images and classes, got none"):
        head_effects(small("nat_mini"), [])
    with pytest.raises(ValueError, match="saw no attention in layers head of Nat"):
        head_effects(alive(small("nat_mini")), [(X, Y)], layers=["head"])
    with pytest.raises(ValueError, match="saw no attention in any layer of Van"):
        head_effects(alive(small("van_b0")), [(X, Y)])
