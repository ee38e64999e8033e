"""Every augmentation key changes what training sees; validation sees none of it."""

import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from foveate.train import TrainError, load_recipe, read_scalars, train
from foveate.train.augment import BatchTransform, random_affine
from foveate.train.data import build_loaders, train_transform
from foveate.train.hooks import seed_everything
from foveate.train.losses import choose_loss
from foveate.train.policies import posterize_to
from foveate.train.recipe import AugmentRecipe

IMAGE = Image.effect_noise((26, 20), 90).convert("RGB")
BOTH = {"mixup": 0.4, "cutmix": 1.0}
CHANGES = [  # what is on already, what one key adds
    ({}, {"randaugment": "rand-m9-mstd0.5-inc1"}),
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
    recipes = [load_recipe(make_recipe(augment={"smoothing": s})) for s in (0.0, 0.1)]
    hard, soft = (choose_loss(recipe)(logits, targets) for recipe in recipes)
    assert hard == F.cross_entropy(logits, targets) and soft > hard
    mixed = [see(load_recipe(make_recipe(augment={"mixup": 0.4, "smoothing": s})))[1] for s in (0.0, 0.3)]
    assert mixed[0].min() == 0 and mixed[1].min() == pytest.approx(0.1)


def test_repeats_show_an_image_several_times_an_epoch(make_recipe):
    once, thrice = (build_loaders(load_recipe(make_recipe(augment={"repeats": r})))[0] for r in (1, 3))
    first, second = ([draw.number for draw in loader.sampler] for loader in (once, thrice))
    assert len(set(first)) == 24 == len(first)
    assert len(set(second)) == 8 and len(second) == 24
    assert len({draw.seed for draw in thrice.sampler}) == 24  # each view is augmented in its own way


def test_the_seed_decides_the_order_of_repeated_views(make_recipe):
    orders = [
        [draw.number for draw in build_loaders(load_recipe(make_recipe(augment={"repeats": 3}, seed=seed)))[0].sampler]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


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


POLICIES = [
    "rand-m9-mstd0.5-inc1",
    "v0",
    "v0r",
    "original-mstd0.5",
    "originalr",
    "3a",
    "augmix-m5-w2-d2",
    "rand-m9-t3aw",
]


@pytest.mark.parametrize("policy", POLICIES)
def test_published_policies_run_on_every_image(make_recipe, policy):
    transform = train_transform(load_recipe(make_recipe(augment={"randaugment": policy})))
    small = IMAGE.resize((8, 8))
    for seed in range(150):
        seed_everything(seed)
        assert transform(small).shape == (3, 16, 16)


def test_posterization_to_0_bits_is_black_and_to_more_bits_is_pillows():
    assert posterize_to(IMAGE, 0).getbbox() is None
    assert posterize_to(IMAGE, 3).tobytes() == ImageOps.posterize(IMAGE, 3).tobytes()
    steps = train_transform(load_recipe(_plain("rand-m9-mstd0.5-inc1"))).transforms
    ops = {op.name: op for step in steps for op in getattr(step, "ops", ())}
    ops["PosterizeIncreasing"].magnitude, ops["PosterizeIncreasing"].prob = 10, 1.0
    ops["PosterizeIncreasing"].magnitude_std = 0
    assert ops["PosterizeIncreasing"](IMAGE).getbbox() is None


def _plain(policy):
    model = {"name": "test_resnet", "num_classes": 3}
    return {
        **{"model": model, "data": {"root": "x", "img_size": 16}, "augment": {"randaugment": policy}},
        **{"optimizer": {"lr": 0.1}, "schedule": {"epochs": 1}},
    }


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ("rand-m9-foo", "unknown section 'foo'"), ("rand-m9-n0", "'n0' has no effect"),
        ("rnd-m9", "unknown policy 'rnd'"),
        ("rand-m9-m8", "m is given twice"), ("rand-m9.5", "unknown section 'm9.5'"), ("rand-tall", "unknown section"),
        ("rand-p1.5", "no probability"), ("v0-m9", "unknown section 'm9'"), ("rand-m9-n99-tweights", "n99 of the 15"),
        ("rand-m9-", "unknown section ''"), ("", "unknown policy ''"), ("rand-inc2", "unknown section 'inc2'"),
        ("augmix-w0", "'w0' has no effect"), ("rand-mstd", "unknown section 'mstd'"),
    ],
)  # fmt: skip
def test_a_policy_that_timm_would_not_read_whole_is_refused(policy, why):
    with pytest.raises(TrainError, match=why) as caught:
        load_recipe(_plain(policy))
    assert str(caught.value).startswith("augment.randaugment: timm cannot read ")


def test_mixing_ends_after_the_epochs_of_the_recipe(make_recipe, tmp_path):
    recipe = make_recipe(augment={"mixup": 5.0}, schedule={"epochs": 3})
    mixed, ended = (
        [line["train_loss"] for line in read_scalars(train({**recipe, **more}, work_dir=tmp_path / name).log)]
        for name, more in (("mixed", {}), ("ended", {"augment": {"mixup": 5.0, "mixup_off_epoch": 1}}))
    )
    assert mixed[0] == ended[0] and mixed[1] != ended[1] and mixed[2] != ended[2]
