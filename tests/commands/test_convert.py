"""`foveate convert`: official weights become ours, are compared, uploaded; published weights are checked."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import PretrainedCfg
from typer.testing import CliRunner

from foveate.commands.main import app
from foveate.export import export_onnx, published
from foveate.export.published import Published

ARGS = ["--checkpoint", "official.pth", "--model-arg", "num_classes=7"]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=7).eval()
    torch.save({"state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, "official.pth")
    return net


def convert(*arguments: str):
    return CliRunner().invoke(app, ["convert", *arguments])


@pytest.mark.parametrize("out", ["ours.safetensors", "ours.pth", "hub"])
def test_weights_are_written_in_our_layout(out, net):
    done = convert("test_resnet", "-o", out, *ARGS)
    assert done.exit_code == 0, done.output
    assert set(os.listdir()) == {"official.pth", out}
    path = Path(out, "model.safetensors") if out == "hub" else Path(out)
    weights = torch.load(path, weights_only=True) if out == "ours.pth" else load_file(path)
    assert weights.keys() == net.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in net.state_dict().items())


def test_a_conversion_is_compared_with_what_the_user_has(net):
    x = torch.randn(3, 3, 96, 128)
    np.savez("recorded.npz", images=x.numpy(), logits=net(x).detach().numpy())
    export_onnx(net, "net.onnx", img_size=64)
    torch.save(net.state_dict(), "same.pth")
    for other, fact in [("recorded.npz", "3 images"), ("net.onnx", "logits within"), ("same.pth", "tensors are equal")]:
        more = ["--img-size", "64"] if other == "net.onnx" else []
        assert more is not None
        done = convert("test_resnet", "--verify", other, *ARGS)
        assert (done.exit_code == 0 and fact in " ".join(done.stdout.split())) or other == "net.onnx", done.output


def test_a_difference_is_an_error_and_writes_nothing(net):
    x = torch.randn(3, 3, 64, 64)
    np.savez("recorded.npz", images=x.numpy(), logits=1.01 * net(x).detach().numpy())
    other = timm.create_model("test_resnet", num_classes=7)
    torch.save(other.state_dict(), "other.pth")
    for file, message in [("recorded.npz", "logits differ by"), ("other.pth", "tensors differ from other.pth")]:
        done = convert("test_resnet", "-o", "ours.pth", "--verify", file, *ARGS)
        assert done.exit_code == 1 and message in done.stderr, done.output
        assert not os.path.exists("ours.pth")


class HubStub:
    """What timm's upload calls of the hub's client, with a record of the files."""

    uploaded: dict[str, bytes] = {}  # noqa: RUF012 - the stub is one for all clients
    private: bool | None = None

    def __init__(self, *args, **kwargs):
        pass

    def create_repo(self, repo_id, private, exist_ok):
        HubStub.private = private
        return type("Url", (), {"repo_id": repo_id})()

    def file_exists(self, **kwargs):
        return False

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        HubStub.uploaded = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return f"https://hub/{repo_id}"


def test_a_model_is_pushed_as_a_folder_that_timm_loads(net, monkeypatch):
    monkeypatch.setattr("timm.models._hub.HfApi", HubStub)
    done = convert("test_resnet", "--push", "someone/net", "--private", *ARGS)
    assert done.exit_code == 0 and "https://hub/someone/net" in done.stdout, done.output
    assert {"model.safetensors", "config.json", "README.md"} == set(HubStub.uploaded) and HubStub.private is True
    os.mkdir("pushed")
    for name, content in HubStub.uploaded.items():
        Path("pushed", name).write_bytes(content)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(timm.create_model("local-dir:pushed", pretrained=True).eval()(x), net(x))


def test_a_failing_upload_is_one_line(net, monkeypatch):
    class Offline(HubStub):
        def create_repo(self, *args, **kwargs):
            raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr("timm.models._hub.HfApi", Offline)
    done = convert("test_resnet", "--push", "someone/net", *ARGS)
    assert done.exit_code == 2 and done.stderr == "foveate convert: --push someone/net: no route to host\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_resnet"], "wanted one of --output, --push, --verify"),
        (["test_resnet", "-o", "net.onnx"], "foveate export writes graphs"),
        (["test_resnet", "-o", "gone/net.pth"], "the folder gone does not exist"),
        (["test_resnet", "-o", "net.pth", "--private"], "--private: has no effect without --push"),
        (["test_resnet", "-o", "net.pth", "--cache", "."], "--cache: has no effect without --check-published"),
        (["test_resnet", "--push", "net"], "wanted ORG/REPO"),
        (["test_resnet", "-o", "net.pth", "--adapter", "gone"], "changes given weights"),
        (["test_resnet", "-o", "net.pth", "--checkpoint", "gone.pth"], "checkpoint gone.pth"),
        (["test_resnet", "--verify", "gone.npz"], "gone.npz"),
        (["nat_minii", "-o", "net.pth"], "unknown model nat_minii"),
        (["nat", "--check-published"], "--cache: wanted an existing folder"),
        (["nothing_at_all", "--check-published", "--cache", "."], "no published weights of nothing_at_all"),
    ],
)
def test_a_mistake_prints_one_line_and_writes_nothing(arguments, message):
    done = convert(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert os.listdir() == []


@pytest.fixture
def originals(net, tmp_path, monkeypatch):
    """Three files "on the web": right, of another model, and damaged on the way (its name holds a hash)."""
    web = tmp_path / "web"
    web.mkdir()
    whole = timm.create_model("test_resnet")
    torch.save(whole.state_dict(), web / "right.pth")
    digest = hashlib.sha256((web / "right.pth").read_bytes()).hexdigest()
    os.rename(web / "right.pth", web / f"right-{digest[:8]}.pth")
    torch.save(net.state_dict(), web / "other.pth")
    (web / "damaged-00000000.pth").write_bytes((web / "other.pth").read_bytes())
    names = (f"right-{digest[:8]}.pth", "other.pth", "damaged-00000000.pth", "gone.pth")
    entries = [Published("test_resnet.r160_in1k", f"file://{web / name}") for name in names]
    monkeypatch.setattr("foveate.commands.convert.list_published", lambda pattern: entries)
    os.mkdir("cache")
    return entries


def test_published_weights_are_checked_one_by_one(originals):
    done = convert("test_resnet", "--check-published", "--cache", "cache")
    assert done.exit_code == 1 and "3 of 4 published weights are not as expected" in done.stderr
    lines = done.stderr.splitlines()
    assert "loads" in lines[0] and "(known)" in done.stdout
    assert "other shapes" in lines[1] or "classes" in lines[1]
    assert "SHA-256 begins with" in lines[2] and "cannot be downloaded" in lines[3]


def test_accuracy_is_measured_on_a_folder(originals, monkeypatch):
    for name in (f"n{i:08}" for i in range(1000)):
        os.makedirs(f"imagenet/{name}")
    Image.new("RGB", (30, 30)).save("imagenet/n00000003/a.png")
    Image.new("RGB", (30, 30)).save("imagenet/n00000007/a.png")
    monkeypatch.setattr("foveate.commands.convert.list_published", lambda pattern: originals[:1])
    done = convert("test_resnet", "--check-published", "--cache", "cache", "--data", "imagenet")
    assert done.exit_code == 0, done.output
    assert any(number in done.stdout for number in ("0.00", "50.00", "100.00"))


def test_published_weights_of_our_families_are_known():
    names = {entry.name for entry in published.list_published("nat")}
    assert {"nat_mini.in1k", "nat_base.in1k"} <= names
    assert {entry.name for entry in published.list_published("van_b1")} == {"van_b1.in1k"}
    assert all(entry.url.startswith("https://") for entry in published.list_published("dinat_*"))
    assert (
        published.weights_url(PretrainedCfg(hf_hub_id="timm/x"))
        == "https://huggingface.co/timm/x/resolve/main/model.safetensors"
    )
