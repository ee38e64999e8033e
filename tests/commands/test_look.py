"""`foveate look`: pictures, pages and lists from the command line, and what it refuses in one line."""

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from looking import Page
from PIL import Image
from timm.data import create_transform, resolve_data_config
from typer.testing import CliRunner

from foveate.analysis import drawing, layer_views
from foveate.commands import look
from foveate.commands.main import app

ARGUMENTS = {"dims": (16, 32), "depths": (1, 1), "kernel_size": 3, "head_dim": 8, "num_classes": 5}
NAT = ["--model", "nat_mini", "--img-size", "32", "--checkpoint", "net.pth"]
NAT += [word for key, value in ARGUMENTS.items() for word in ("--model-arg", f"{key}={value}")]
VIT = ["--model", "vit_tiny_patch16_224", "--img-size", "32"]
VIT += ["--model-arg", "depth=1", "--model-arg", "embed_dim=24", "--model-arg", "num_classes=5"]


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save("photo.png")


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = timm.create_model("nat_mini", **ARGUMENTS).eval()
    torch.save(net.state_dict(), "net.pth")
    return net


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that the command writes."""
    kept: list = []

    def write(figure, out):
        kept.append(figure)
        drawing.write_figure(figure, out)

    monkeypatch.setattr(look, "write_figure", write)
    return kept


def run(*arguments: str):
    return CliRunner().invoke(app, ["look", *arguments])


def done(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def seen_by(net, size=(32, 32), **changes) -> torch.Tensor:
    config = resolve_data_config({"input_size": (3, *size)}, model=net) | changes
    return create_transform(**config)(Image.open("photo.png").convert("RGB"))[None]


def titles(figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def test_a_picture_of_one_layer_shows_the_weights_of_the_model(net, figures):
    out = done("photo.png", *NAT, "--layer", "1", "--query", "9,20", "-o", "look.png")
    assert Path("look.png").read_bytes()[:4] == b"\x89PNG" and "32 x 32 px" in out and "net.pth" in out
    view = layer_views(net, seen_by(net))[1]
    (figure,) = figures
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert len(panels) == 1 + view.heads == 5
    for head, axis in enumerate(panels[1:]):
        row = view.keys.on_map(view.weights([view.query_at(9, 20)]))[head, 0]
        np.testing.assert_allclose(np.ma.filled(axis.images[-1].get_array(), 0), row, rtol=0, atol=1e-5)
    picture = torch.from_numpy(np.asarray(panels[0].images[0].get_array()))
    expected = seen_by(net)[0].permute(1, 2, 0) * torch.tensor([0.229, 0.224, 0.225])
    expected = (expected + torch.tensor([0.485, 0.456, 0.406])) * 255
    torch.testing.assert_close(picture.float(), expected, rtol=0, atol=0.51)


def test_a_picture_of_all_layers_has_a_panel_each(net, figures):
    done("photo.png", *NAT, "-o", "look.png")
    layers = [f"stages.{i}.blocks.0.attn\nneighborhood_attention, mean over heads" for i in (0, 1)]
    assert titles(figures[0]) == ["query at x 16, y 16", *layers]
    done("photo.png", *NAT, "--layer", "stages.0.blocks.0.attn", "--head", "1", "-o", "look.png")
    assert titles(figures[1])[1:] == [layers[0].replace("mean over heads", "head 1")]


def test_a_page_holds_all_layers_and_begins_with_what_is_asked_for(net):
    out = done("photo.png", *NAT, "--query", "9,20", "--head", "1", "-o", "look.html")
    assert "MB" in out and "left out" in out
    page, views = Page(Path("look.html")), layer_views(net, seen_by(net))
    assert (page.data["query"], page.data["pinned"], page.data["head"]) == ([9, 20], True, 1)
    assert [one["title"] for one in page.views] == [view.title for view in views]
    for number, view in enumerate(views):
        np.testing.assert_allclose(page.weights(number)[1], view.weights(), rtol=0, atol=1e-5)
    done("photo.png", *NAT, "--layer", "0", "-o", "one.html")
    assert [one["title"] for one in Page(Path("one.html")).views] == [views[0].title]


def test_the_whole_image_is_shown_in_its_proportions(net, figures):
    out = done("photo.png", *NAT, "--whole", "-o", "look.png")
    assert "32 x 64 px" in out  # 40 x 60: the long side in multiples of 32 px
    panel = figures[0].axes[0]
    assert panel.get_xlim() == (0, 64) and panel.get_ylim() == (32, 0)
    expected = layer_views(net, seen_by(net, (32, 64), crop_pct=1.0, crop_mode="squash"))[0]
    row = expected.keys.on_map(expected.weights([expected.query_at(32, 16)]).mean(0))[0]
    drawn = next(axis for axis in figures[0].axes if expected.title in axis.get_title()).images[-1].get_array()
    np.testing.assert_allclose(np.ma.filled(drawn, 0), row, rtol=0, atol=1e-5)


def test_models_of_a_fixed_size_are_built_for_the_whole_image(figures):
    out = done("photo.png", *VIT, "--whole", "-o", "look.png")
    assert "32 x 64 px" in out and "blocks.0.attn" in titles(figures[0])[1]


def test_rollout_and_grad_cam_are_panels_of_their_own(figures):
    done("photo.png", *VIT, "--rollout", "--grad-cam", "--target", "3", "-o", "look.png")
    assert [title.partition("\n")[0] for title in titles(figures[0])[1:]] == [
        "blocks.0.attn", "attention rollout", "blocks.0.norm1 class 3",
    ]  # fmt: skip


def test_grad_cam_needs_no_attention(figures):
    done("photo.png", "--model", "test_resnet", "--grad-cam", "-o", "look.png")
    assert len(titles(figures[0])) == 2 and "Grad-CAM" in titles(figures[0])[1]


def test_without_a_file_the_layers_are_listed(net):
    out = done("photo.png", *NAT)
    assert "stages.1.blocks.0" in out and "neighborhood" in out and "8 x 8" in out and "4 x 4" in out


def test_profiles_of_a_folder_are_plotted(net, figures):
    os.mkdir("pictures")
    for i in range(3):
        Image.new("RGB", (40, 40), (40 * i, 99, 200)).save(f"pictures/{i}.png")
    done("pictures", *NAT, "--profiles", "-o", "look.png")
    labels = [axis.get_ylabel() for axis in figures[0].axes]
    assert labels == ["mean distance, tokens", "entropy, nats", "importance, nats"]
    assert len(figures[0].axes[2].collections[0].get_offsets()) == 6  # 2 heads and 4 heads


def test_a_gray_model_sees_a_gray_image(figures):
    done("photo.png", *NAT[:4], *NAT[6:], "--model-arg", "in_chans=1", "-o", "look.png")
    picture = np.asarray(figures[0].axes[0].images[0].get_array())
    assert (picture[..., 0] == picture[..., 2]).all() and picture.std() > 0


REFUSED = [
    (["gone.png", *NAT, "-o", "a.png"], "image gone.png does not exist"),
    (["broken.png", *NAT, "-o", "a.png"], "broken.png is not a readable image"),
    ([".", *NAT, "-o", "a.png"], "is a folder"),
    (["photo.png", "-o", "a.png"], "wanted the name of a model, or --checkpoint"),
    (["photo.png", "--model", "nat_minii", "-o", "a.png"], "unknown model nat_minii"),
    (["photo.png", *NAT, "-o", "a.jpg"], "wanted a file ending in .png or .html, got a.jpg"),
    (["photo.png", *NAT, "-o", "gone/a.png"], "the folder gone does not exist"),
    (["photo.png", *NAT, "-o", "folder.png"], "-o folder.png: is a folder"),
    (["photo.png", *NAT, "-o", "photo.png"], "-o photo.png: is the image, which would be lost"),
    (["photo.png", *NAT, "-o", "folder.png/../photo.png"], "is the image, which would be lost"),
    (["photo.png", *NAT, "--query", "3", "-o", "a.png"], "--query: wanted two numbers x,y, got '3'"),
    (["photo.png", *NAT, "--query", "3,x", "-o", "a.png"], "--query: wanted two numbers"),
    (["photo.png", *NAT, "--query", "32,3", "-o", "a.png"], "0 <= x < 32 and 0 <= y < 32, got 32,3"),
    (["photo.png", *NAT, "--query=-1,3", "-o", "a.html"], "inside the image"),
    (["photo.png", *NAT, "--query", "nan,3", "-o", "a.png"], "inside the image"),
    (["photo.png", *NAT, "--layer", "2", "-o", "a.png"], "--layer 2: the list has layers 0 to 1"),
    (
        ["photo.png", *NAT, "--layer", "stages.0.attn", "-o", "a.png"],
        "no such layer; did you mean stages.1.blocks",
    ),
    (["photo.png", *NAT, "--head", "4", "-o", "a.png"], "wanted a head from 0 to 3, got 4"),
    (["photo.png", *NAT, "--layer", "0", "--head", "2", "-o", "a.html"], "wanted a head from 0 to 1, got 2"),
    (["photo.png", *NAT, "--head", "-1", "-o", "a.png"], "Invalid value for '--head'"),
    (["photo.png", *NAT, "--target", "1", "-o", "a.png"], "--target: is the class of --grad-cam"),
    (["photo.png", *NAT, "--grad-cam", "--target", "5", "-o", "a.png"], "the model has classes 0 to 4, got 5"),
    (["photo.png", *NAT, "--rollout", "-o", "a.png"], "wanted one map of tokens in all layers"),
    (["photo.png", "--model", "test_resnet", "-o", "a.png"], "saw neither attention nor gates in any layer"),
    (["photo.png", "--model", "test_resnet", "--rollout", "--grad-cam", "-o", "a.png"], "saw neither attention"),
    (["photo.png", "--model", "test_resnet", "--profiles", "-o", "a.png"], "--profiles: attention_maps: saw no"),
    (["photo.png", *NAT, "--profiles", "-o", "a.html"], "--profiles: wanted -o FILE.png, got a.html"),
    (["photo.png", *NAT, "--profiles"], "--profiles: wanted -o FILE.png, got None"),
    (["photo.png", *NAT, "--profiles", "--head", "0", "-o", "a.png"], "--head: --profiles plots all heads"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_a_mistake_prints_one_line_and_writes_nothing(arguments, message, net):
    Path("broken.png").write_text("no image")
    os.mkdir("folder.png")
    before = sorted(os.listdir())
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("foveate look: ") and result.stdout == ""
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("package", ["matplotlib", "pytorch_grad_cam"])
def test_a_missing_package_is_named_before_the_model_is_opened(package, monkeypatch):
    module = "drawing" if package == "matplotlib" else "cam"
    monkeypatch.setattr(f"foveate.analysis.{module}.find_spec", lambda name: None)
    monkeypatch.setattr(look, "open_model", lambda *_, **__: pytest.fail("opened"))
    result = run("photo.png", *NAT, "--grad-cam", "-o", "look.png")
    assert result.exit_code == 2 and 'pip install "foveate[look]"' in result.stderr


def test_a_folder_without_permission_is_named(monkeypatch):
    os.mkdir("closed")
    monkeypatch.setattr("foveate._files.os.access", lambda _, mode: not mode & os.W_OK)  # root may write anywhere
    result = run("photo.png", *NAT, "-o", "closed/look.png")
    assert result.exit_code == 2 and "no write permission" in result.stderr
