"""Files that are unusual, and files that cannot be read: each is read rightly, or named and counted."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.train import TrainError, evaluate, load_recipe, read_scalars, train
from foveate.train.data import build_loaders
from foveate.train.images import decode
from foveate.train.unreadable import LIST

NOISE = Image.effect_noise((26, 20), 60).convert("RGB")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(NOISE, "JPEG", exif=exif)


def wrong_crc() -> bytes:
    data = bytearray(encoded(NOISE, "PNG"))
    data[data.index(b"IDAT") + 10] ^= 0xFF
    return bytes(data)


def bomb() -> bytes:
    """A PNG whose header says 20000 x 20000."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 999)) + chunk(b"IEND", b"")
    )


DEEP = Image.fromarray((np.arange(520).reshape(20, 26) * 126).astype(np.uint16))
GOOD = {  # name: content
    "grey.png": encoded(NOISE.convert("L"), "PNG"),
    "cmyk.jpg": encoded(NOISE.convert("CMYK"), "JPEG"),
    "palette.png": encoded(NOISE.convert("P"), "PNG"),
    "transparent palette.png": encoded(NOISE.convert("P"), "PNG", transparency=b"\x10\x80\xff"),
    "rgba.png": encoded(NOISE.convert("RGBA"), "PNG"),
    "la.png": encoded(NOISE.convert("LA"), "PNG"),
    "deep.png": encoded(DEEP, "PNG"),
    "bilevel.png": encoded(NOISE.convert("1"), "PNG"),
    "exif.jpg": rotated(),
    "webp.webp": encoded(NOISE, "WEBP"),
    "gif.gif": encoded(NOISE.convert("P"), "GIF"),
    "bmp.bmp": encoded(NOISE, "BMP"),
    "tiff.tiff": encoded(NOISE, "TIFF"),
    "UPPER.JPG": encoded(NOISE, "JPEG"),
    "n\u00e4me \u7334.png": encoded(NOISE, "PNG"),
    "jpeg named.png": encoded(NOISE, "JPEG"),
    "pixel.png": encoded(NOISE.crop((0, 0, 1, 1)), "PNG"),
    "flat.png": encoded(NOISE.resize((3000, 2)), "PNG"),
    "large.jpg": encoded(Image.new("RGB", (6000, 4000), "grey"), "JPEG"),
}
BAD = {
    "bomb.png": bomb(),
    "._a.jpg": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X",
    "page.jpg": b"<!DOCTYPE html><html>404</html>",
    "truncated.jpg": encoded(NOISE, "JPEG")[:600],
    "empty.jpg": b"",
    "crc.png": wrong_crc(),
    "dangling.jpg": None,
    "32 bit floats.tiff": encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
}
IGNORED = {"notes.txt": b"not an image", "folder.jpg": None}


@pytest.fixture
def data(images: Path, tmp_path: Path) -> Path:
    return shutil.copytree(images, tmp_path / "data")


def put(folder: Path, name: str, content: bytes | None) -> str:
    """Write a file into class bee."""
    path = folder / "bee" / name
    if name == "dangling.jpg":
        path.symlink_to("nowhere")
    elif content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    return path.name


def one_epoch(make_recipe, data, tmp_path, **more):
    recipe = make_recipe(data={"root": str(data)}, schedule={"epochs": 1}, augment={"scale": (0.5, 1.0)}, **more)
    return train(recipe, work_dir=tmp_path / "run")


def test_all_unusual_images_train_and_validate_and_are_counted(make_recipe, data, tmp_path, capsys):
    for split in ("train", "val"):
        for name, content in (GOOD | IGNORED).items():
            put(data / split, name, content)
        (data / split / "bee" / "deep" / "er").mkdir(parents=True)
    result = one_epoch(make_recipe, data, tmp_path, batch_size=1, model={"name": "test_vit", "img_size": 16})
    (line,) = read_scalars(result.log)
    assert line["iter"] == 24 + len(GOOD) and "unreadable" not in line and "val_unreadable" not in line
    measured = evaluate(result.last_checkpoint)
    assert (measured.images, measured.unreadable) == (9 + len(GOOD), 0)
    assert "cannot read" not in capsys.readouterr().out and not (tmp_path / "run" / LIST).exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_cannot_be_read_are_named_counted_and_skipped(make_recipe, data, tmp_path, capsys, workers):
    names = [put(data / split, name, content) for split in ("train", "val") for name, content in BAD.items()]
    recipe = make_recipe(
        data={"root": str(data), "workers": workers}, batch_size=2, schedule={"epochs": 2}, augment={"mixup": 0.5}
    )
    result = train(recipe, work_dir=tmp_path / "run")
    lines = read_scalars(result.log)
    assert [line["unreadable"] for line in lines] == [len(BAD)] * 2 == [line["val_unreadable"] for line in lines]
    assert [line["iter"] for line in lines] == [16, 32]  # the epoch keeps its length
    out = capsys.readouterr().out
    assert all(
        out.count(f"cannot read {split} image bee/{n}: ") == 1 for split in ("training", "validation") for n in names
    )
    assert f"{len(BAD)} unreadable images replaced" in out and f"{len(BAD)} validation images not read" in out
    listed = (tmp_path / "run" / LIST).read_text().splitlines()
    assert len(listed) == 2 * len(BAD) and all(line.count("\t") == 2 for line in listed)
    measured = evaluate(result.last_checkpoint)
    assert (measured.images, measured.unreadable) == (9, len(BAD))
    assert measured.top1 == pytest.approx(lines[-1]["val_top1"])  # of the images that were read


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("dangling.jpg", "empty.jpg")])
def test_each_damage_alone_ends_in_one_line_with_the_file_where_none_may_be_unreadable(make_recipe, data, name):
    put(data / "train", name, BAD[name])
    loader, _, _ = build_loaders(load_recipe(make_recipe(data={"root": str(data), "max_unreadable": 0}, batch_size=25)))
    (batch,) = loader
    assert name.split(".")[0] in batch.error and "cannot be read: " in batch.error and "\n" not in batch.error


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_the_limit_end_the_run_in_one_line_with_a_name(make_recipe, data, tmp_path, workers):
    for i in range(3):
        (data / "train" / "cow" / f"x{i}.jpg").write_bytes(b"")
    changes = {"data": {"root": str(data), "max_unreadable": 2, "workers": workers}, "schedule": {"epochs": 1}}
    changes |= {"batch_size": 3, "model": {"name": "test_vit", "img_size": 16}}
    with pytest.raises(
        TrainError, match=r"data: 3 training images cannot be read, the last is cow/x\d.jpg: Unid"
    ) as error:
        train(make_recipe(**changes), work_dir=tmp_path / "run")
    assert "\n" not in str(error.value)
    changes["data"]["max_unreadable"] = 3
    assert read_scalars(train(make_recipe(**changes), work_dir=tmp_path / "run").log)[0]["unreadable"] == 3


def test_validation_beyond_the_limit_is_an_error_and_so_is_a_split_without_images(make_recipe, data, tmp_path):
    result = one_epoch(make_recipe, data, tmp_path)
    for path in (data / "val").glob("*/[01].png"):
        path.write_bytes(b"broken")
    assert evaluate(result.last_checkpoint).images == 3
    with pytest.raises(TrainError, match=r"3 validation images cannot be read, the last is .*max_unreadable is 1"):
        evaluate(result.last_checkpoint, cfg_options={"data.max_unreadable": 1})
    for path in (data / "val").glob("*/*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(TrainError, match="none of the 9 validation images can be read"):
        evaluate(result.last_checkpoint)


def test_16_bits_are_scaled_and_not_clipped(make_recipe, data):
    pixels = np.asarray(decode(io.BytesIO(GOOD["deep.png"]))).astype(int)
    exact = np.arange(520).reshape(20, 26) * 126 / 257
    assert pixels.shape == (20, 26) and abs(pixels - exact).max() <= 0.5
    for dtype in ("<u2", ">u2", "<i4"):
        tiff = encoded(Image.fromarray(np.asarray(DEEP).astype(dtype)), "TIFF")
        assert np.array_equal(np.asarray(decode(io.BytesIO(tiff))), pixels)
    for value in (-1, 65536):
        with pytest.raises(ValueError, match="no known range"):
            decode(io.BytesIO(encoded(Image.fromarray(np.full((2, 2), value, np.int32)), "TIFF")))


def test_torchs_folder_scales_16_bits_and_names_files_too(make_recipe, data, tmp_path):
    for split in ("train", "val"):
        put(data / split, "deep.png", GOOD["deep.png"])
        put(data / split, "page.jpg", BAD["page.jpg"])
    recipe = make_recipe(data={"root": str(data), "source": "torch/image_folder"}, batch_size=26)
    loader, _, _ = build_loaders(load_recipe(recipe))
    (batch,) = loader
    assert [Path(name).name for name, _ in batch.skipped] == ["page.jpg"]
    names = [loader.dataset.name(i) for i in batch.indices]
    image = batch.images[next(i for i, name in enumerate(names) if name.endswith("deep.png"))]
    assert 100 < image.float().mean() < 150


def test_an_image_that_cannot_be_augmented_ends_the_run_with_its_name(make_recipe, data, tmp_path, monkeypatch):
    def broken(image):
        raise IndexError("out of range")

    monkeypatch.setattr("foveate.train.data.train_transform", lambda recipe: broken)
    with pytest.raises(TrainError, match=r"data: \w+/\d.png cannot be augmented: IndexError: out of range"):
        one_epoch(make_recipe, data, tmp_path)


def test_a_seed_gives_the_same_images_whichever_files_are_skipped(make_recipe, data):
    recipe = load_recipe(make_recipe(data={"root": str(data)}, augment={"randaugment": "rand-m9-mstd0.5-inc1"}))
    before = {
        i: image for batch in build_loaders(recipe)[0] for i, image in zip(batch.indices, batch.images, strict=True)
    }
    (data / "train" / "ant" / "0.png").write_bytes(b"")
    after = {
        i: image for batch in build_loaders(recipe)[0] for i, image in zip(batch.indices, batch.images, strict=True)
    }
    assert 0 in before and 0 not in after
    assert all(torch.equal(before[i], image) for i, image in after.items() if i != 1)
