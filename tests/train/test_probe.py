"""Probes of frozen features: they count what scikit-learn predicts, and change nothing."""

import shutil

import pytest
import timm
import torch

from foveate.train import MissingPackageError, TrainError
from foveate.train.probe import ProbeRequest, probe

QUICK = {"workers": 0, "img_size": 32, "neighbors": 3}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return timm.create_model("nat_mini", dims=(16, 32), depths=(1, 1), head_dim=8, kernel_size=3, num_classes=0)


@pytest.mark.parametrize("method", ["knn", "linear"])
def test_brightness_is_found_in_random_features(net, images, method):
    """The classes differ in brightness. With each of 20 seeds both methods found at least 8 of 9."""
    before = {key: value.clone() for key, value in net.state_dict().items()}
    result = probe(net, ProbeRequest(data=images, method=method, **QUICK), device="cpu")
    assert (result.train_images, result.images, result.features, result.unreadable) == (24, 9, 32, ())
    assert result.top1 > 60
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_the_prediction_is_scikit_learns(net, images):
    from sklearn.neighbors import KNeighborsClassifier

    from foveate.train.probe import _features, _open

    request = ProbeRequest(data=images, **QUICK)
    splits = [_features(net, _open(net, request, s, None)[0], request, torch.device("cpu")) for s in ("train", "val")]
    (x, y, _), (a, b, _) = splits
    wanted = KNeighborsClassifier(3, metric="cosine", weights="uniform").fit(x, y).predict(a)
    assert probe(net, request, device="cpu").top1 == pytest.approx(100 * (wanted == b).mean(), abs=12)
    assert probe(net, ProbeRequest(data=images, **QUICK | {"neighbors": 24}), device="cpu").images == 9


def test_unreadable_images_are_left_out_and_named(net, images, tmp_path):
    data = shutil.copytree(images, tmp_path / "data")
    (data / "train" / "ant" / "0.png").write_bytes(b"")
    result = probe(net, ProbeRequest(data=data, **QUICK), device="cpu")
    assert result.train_images == 23 and len(result.unreadable) == 1


def test_probes_that_cannot_work_are_refused(net, images, tmp_path, monkeypatch):
    for data, more, message in [
        (tmp_path, {}, "has no split 'train'"),
        (images, {"neighbors": 25}, "wanted at least 25 training images, one per neighbor, got 24"),
    ]:
        with pytest.raises(TrainError, match=message):
            probe(net, ProbeRequest(data=data, **QUICK | more), device="cpu")
    monkeypatch.setattr("foveate.train.probe.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'pip install "foveate\[probe\]"'):
        probe(net, ProbeRequest(data=images), device="cpu")
