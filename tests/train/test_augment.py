"""Every augmentation key changes what training sees; validation sees none of it."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from foveate.train import load_recipe
from foveate.train.augment import BatchTransform, random_affine
from foveate.train.data import build_loaders, train_transform
from foveate.train.hooks import seed_everything
from foveate.train.model import choose_loss
from foveate.train.recipe import AugmentRecipe

IMAGE = Image.effect_noise((26, 20), 90).convert("RGB")
BOTH = {"mixup": 0.4, "cutmix": 1.0}
CHANGES = [  # what is on already, what one key adds
    ({}, {"randaugment": "rand-m9-mstd0.5-mmax9-inc1"}),
    ({}, {"color_jitter": 0.4}),
    ({}, {"hflip": 1.0}),
    ({}, {"scale": (0.2, 0.3)}),
    ({"scale": (0.2, 0.3)}, {"ratio": (0.3, 0.4)}),
    ({}, {"rotate": 20.0}),
    ({}, {"shift": 0.2}),
    ({}, {"zoom": 0.2}),
    ({}, {"erasing": 1.0}),
    ({"erasing": 1.0}, {"erasing_mode": "const"}),
    ({}, {"mixup": 0.4}),
    ({}, {"cutmix": 1.0}),
    ({"mixup": 0.4}, {"mix_prob": 1e-9}),
    (BOTH, {"switch_prob": 0.999999}),
]


def see(recipe, training=True):
    """Return a batch of four noise images as the model gets it, all random draws from one seed."""
    seed_everything(3)
    transform = train_transform(recipe)
    batch = torch.stack([transform(IMAGE.rotate(90 * i, expand=True)) for i in range(4)]), torch.arange(4) % 3
    return BatchTransform(recipe)(batch, training)


@pytest.mark.parametrize(("on", "key"), CHANGES, ids=lambda part: "+".join(part) or "plain")
def test_each_key_changes_the_images(make_recipe, on, key):
    before = see(load_recipe(make_recipe(augment=on)))[0]
    after = see(load_recipe(make_recipe(augment={**on, **key})))[0]
    assert before.shape == after.shape and not torch.allclose(before, after)


def test_train_interpolation_changes_the_images(make_recipe):
    plain, nearest = (see(load_recipe(make_recipe(data={"train_interpolation": i})))[0] for i in (None, "nearest"))
    assert not torch.allclose(plain, nearest)


def test_smoothing_changes_the_loss_with_and_without_mixing(make_recipe):
    logits, targets = torch.tensor([[4.0, 0.0, 0.0]] * 4), torch.zeros(4, dtype=torch.long)
    hard, soft = (choose_loss(AugmentRecipe(smoothing=s))(logits, targets) for s in (0.0, 0.1))
    assert hard == F.cross_entropy(logits, targets) and soft > hard
    mixed = [see(load_recipe(make_recipe(augment={"mixup": 0.4, "smoothing": s})))[1] for s in (0.0, 0.3)]
    assert mixed[0].min() == 0 and mixed[1].min() == pytest.approx(0.1)


def test_repeats_show_an_image_several_times_an_epoch(make_recipe):
    once, thrice = (build_loaders(load_recipe(make_recipe(augment={"repeats": r})))[0] for r in (1, 3))
    assert len(set(once.sampler)) == 24 == len(list(once.sampler))
    assert len(set(thrice.sampler)) == 8 and len(list(thrice.sampler)) == 24


def test_validation_is_only_normalised(make_recipe, everything):
    recipe = load_recipe(make_recipe(**everything))
    images, targets = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8), torch.arange(5)
    seen, same = BatchTransform(recipe)((images, targets), training=False)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (recipe.data.mean, recipe.data.std))
    assert torch.allclose(seen, (images / 255 - mean) / std) and same is targets


def test_mixing_never_meets_an_odd_batch(make_recipe):
    train, val, _ = build_loaders(load_recipe(make_recipe(augment={"mixup": 1.0}, batch_size=14)))
    assert [len(targets) for _, targets in train] == [14]  # of 24: the last, partial batch is dropped
    assert [len(targets) for _, targets in val] == [9]  # validation keeps it, unmixed


def test_a_shift_moves_each_image_by_its_own_amount_and_brings_in_black():
    torch.manual_seed(0)
    images = torch.zeros(6, 1, 20, 30)
    images[..., 8:12, 13:17] = 1
    moved = random_affine(images, AugmentRecipe(shift=0.2))
    columns = (moved * torch.arange(30.0)).sum((1, 2, 3)) / moved.sum((1, 2, 3)) - 14.5
    assert columns.abs().max() <= 0.2 * 30 and columns.std() > 1
    assert moved.amax() <= 1 and moved.amin() >= 0


def test_a_turn_keeps_the_shape_of_what_it_turns():
    """On a map that is not square, units that differ between rows and columns would shear the disc."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(40) - 19.5, torch.arange(60) - 29.5, indexing="ij")
    disc = ((x**2 + y**2) < 12**2).float().expand(4, 1, 40, 60)
    turned = random_affine(disc, AugmentRecipe(rotate=90.0))
    assert (turned - disc).abs().mean() < 0.01
