"""`tests/goldens/record.py` makes the goldens that the tests read: the one of DaVit from timm's DaVit."""

import importlib
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

GOLDENS = Path(__file__).parent / "goldens"
NOISE = 1e-4  # of the standard deviation, or of a gradient's norm; measured: 2e-5
# timm's keys to those of the official code, which the weights of the golden are drawn by
DAVIT = [r"^stem\.=patch_embeds.0.", r"^stages\.(\d)\.downsample\.=patch_embeds.\1."]
DAVIT += [r"^(patch_embeds\.\d)\.conv\.=\1.proj.", r"^stages\.(\d)\.blocks\.=main_blocks.\1."]
DAVIT += [r"\.cpe1\.=.cpe.0.", r"\.cpe2\.=.cpe.1.", r"^head\.norm\.=norms.", r"^head\.fc\.=head."]

OTHER_CODE = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, dim=8, returns=lambda x, logits: logits):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, dim, 4, 4), nn.BatchNorm2d(dim)
        self.tokens, self.head, self.returns = nn.Identity(), nn.Linear(dim, 5), returns
        self.register_buffer("mask", torch.full((dim,), 0.5))
        self.register_buffer("index", torch.arange(dim))

    def forward(self, x):
        x = self.norm(self.stem(x) * self.mask[self.index][:, None, None]).permute(0, 2, 3, 1)
        tokens, _ = self.tokens((x.flatten(1, 2), 4))
        return self.returns(x, self.head(tokens.mean(1)))

class Tied(Net):
    def __init__(self):
        super().__init__()
        self.same = self.head

class In_place(Net):
    def __init__(self):
        super().__init__(returns=lambda x, logits: (self.last(x).zero_(), logits)[1])
        self.last, self.idle = nn.Identity(), nn.Identity()

class Twice(Net):
    def __init__(self):
        super().__init__(returns=lambda x, logits: self.last(self.last(logits)))
        self.last = nn.Identity()

not_callable = 3
no_model = lambda: {}
dense = lambda: Net(returns=lambda x, logits: [x, 2 * x])
both = lambda: Net(returns=lambda x, logits: {"logits": logits, "map": x})
half = lambda: Net(returns=lambda x, logits: (logits, None))
text = lambda: Net(returns=lambda x, logits: "logits")
empty = lambda: Net(returns=lambda x, logits: [])
infinite = lambda: Net(returns=lambda x, logits: logits / 0)
random = lambda: Net(returns=lambda x, logits: F.dropout(logits))
"""


@pytest.fixture(scope="module")
def other_code(tmp_path_factory):
    """A folder with the code of others."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "other_code.py").write_text(OTHER_CODE)
    return folder


@pytest.fixture
def run(monkeypatch, other_code, tmp_path):
    """A function that runs the command, writing to tmp_path."""
    monkeypatch.setattr(sys, "path", [str(GOLDENS), *sys.path])
    monkeypatch.delitem(sys.modules, "record", raising=False)
    app = importlib.import_module("record").app

    def invoke(make, *options, path=other_code, name="net__small"):
        return CliRunner().invoke(app, [name, "--make", make, f"--path={path}", f"--out={tmp_path}", *options])

    yield invoke
    sys.modules.pop("record", None)


@pytest.fixture
def recorded(run, tmp_path):
    """A function that runs the command and returns JSON and arrays."""

    def record(make, *options, **given):
        result = run(make, *options, **given)
        assert result.exit_code == 0, result.output + str(result.exception)
        (arrays,) = tmp_path.glob("*.npz")
        return json.loads(arrays.with_suffix(".json").read_text()), np.load(arrays)

    return record


def test_timms_davit_gives_the_golden_in_hand(recorded, golden):
    expected, logits = golden("davit__official_tiny")
    renames = [f"--rename={pair}" for pair in DAVIT]
    davit = {"variant": "fv_davit_tiny", "gradients": "samples"}
    options = [f"--{key}={value}" for key, value in davit.items()]
    facts, arrays = recorded("timm.models.davit:davit_tiny", *renames, *options, name="davit__official_tiny")
    assert facts["recorded"]["source"].startswith("timm ")
    assert [facts[key] for key in ("variant", "params")] == [expected[key] for key in ("variant", "params")]
    assert sorted(facts["state_dict"]) == sorted(expected["state_dict"])
    assert np.abs(arrays["224x224"] - logits["default"]).max() <= NOISE * logits["default"].std()
    ours, theirs = facts["inputs"][0], expected["inputs"][0]
    assert [ours[key] for key in ("shape", "seed")] == [theirs[key] for key in ("shape", "seed")]
    assert ours["stages"].keys() == theirs["stages"].keys()
    for name, stage in theirs["stages"].items():
        assert ours["stages"][name]["shape"] == stage["shape"]
        values = [np.array([found["std"], *found["samples"]]) for found in (ours["stages"][name], stage)]
        assert np.abs(values[0] - values[1]).max() <= NOISE * stage["std"], name
    assert facts["grads"].keys() == expected["grads"].keys()
    for name, grad in expected["grads"].items():
        values = [np.array([found["l2"], *found["samples"]]) for found in (facts["grads"][name], grad)]
        assert np.abs(values[0] - values[1]).max() <= NOISE * grad["l2"], name


SMALL = ["--arg=dim=4", "--size=12x16", "--size=8x8", "--computed=mask", r"--rename=^head\.=fc."]


def test_the_json_is_enough_to_make_the_outputs_again(recorded, det):
    weights = ["--mul=fc.weight=0.5", "--gain=1.5", "--grad-gain=2"]
    stages = ["--stage=0=stem", "--stage=3=tokens"]
    facts, arrays = recorded("other_code:Net", *SMALL, *weights, *stages)
    assert [facts[key] for key in ("mul", "gain", "grad_gain")] == [{"fc.weight": 0.5}, 1.5, 2]
    changed = [key for key, _, _ in facts["state_dict"] if key.startswith(("fc", "head", "mask"))]
    assert changed == ["fc.weight", "fc.bias"]
    model = importlib.import_module("other_code").Net(4).eval()
    for gain in (facts["grad_gain"], facts["gain"]):
        drawn = det.det_state_dict(facts["state_dict"], facts["mul"], gain)
        model.load_state_dict({key.replace("fc.", "head."): value for key, value in drawn.items()}, strict=False)
        if gain == facts["grad_gain"]:
            out = model(torch.from_numpy(det.det_input([2, 3, 12, 16], 0)))
            (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
    for key, parameter in model.named_parameters():
        grad, name = parameter.grad.double(), key.replace("head.", "fc.")
        probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{name}".encode())))
        expected = {"l2": float(grad.norm()), "dot": float((grad * probe).sum())}
        assert facts["grads"][name] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    for given, shape in zip(facts["inputs"], ([2, 3, 12, 16], [1, 3, 8, 8]), strict=True):
        assert given["shape"] == shape
        x = torch.from_numpy(det.det_input(shape, given["seed"]))
        torch.testing.assert_close(torch.from_numpy(arrays[given["name"]]), model(x).detach())
        map_, tokens = given["stages"]["stage0"], given["stages"]["stage3"]
        expected = model.stem(x)
        assert map_["shape"] == [*expected.shape] and tokens["shape"] == [shape[0], shape[2] * shape[3] // 16, 4]
        torch.testing.assert_close(map_["std"], float(expected.detach().double().std(correction=0)))
        samples = expected.detach().flatten().numpy()[det.sample_index(expected.numel(), 64)]
        torch.testing.assert_close(np.array(map_["samples"]), samples.astype(float))


def test_maps_with_channels_last_are_recorded_with_channels_first(recorded):
    facts, _ = recorded("other_code:In_place", "--size=12x16", "--stage=0=last", "--channels-last", "--computed=mask")
    assert facts["inputs"][0]["stages"]["stage0"]["shape"] == [2, 8, 3, 4]


def test_a_map_is_recorded_before_a_later_layer_changes_it_in_place(recorded):
    facts, _ = recorded("other_code:In_place", "--size=12x16", "--stage=0=last", "--computed=mask")
    assert facts["inputs"][0]["stages"]["stage0"]["std"] > 0


def test_lists_and_dicts_of_maps_are_recorded(recorded):
    facts, arrays = recorded("other_code:dense", "--size=64x64", "--computed=mask")
    assert "grads" not in facts
    assert [out["shape"] for out in facts["inputs"][0]["stages"].values()] == [[2, 16, 16, 8]] * 2
    assert arrays["64x64/out0"].shape == (1024,)
    np.testing.assert_array_equal(2 * arrays["64x64/out0"], arrays["64x64/out1"])
    facts, arrays = recorded("other_code:both", "--size=8x8", "--computed=mask", "--force")
    assert {*arrays} == {"8x8", "8x8/map"} and len(facts["grads"]) == 6


REFUSED = {
    "other_cod:Net": "cannot import other_cod: No module named 'other_cod'",
    "other_code:Ne": "no function Ne in other_code; did you mean Net?",
    "other_code:not_callable": "no function not_callable in other_code",
    "other_code": "--make wants MODULE:FUNCTION, got 'other_code'",
    ".other_code:Net": "--make wants MODULE:FUNCTION",
    "other_code:no_model": "returned dict, not a torch.nn.Module",
    "other_code:half": "the model's output out1 is a NoneType, not a tensor",
    "other_code:text": "the model returned str, not a tensor or a list, tuple or dict of tensors",
    "other_code:empty": "the model returned list, not a tensor",
    "other_code:infinite": "logits is not finite",
    "other_code:random": "the model draws random numbers in eval mode",
    "other_code:Tied": "does not keep its drawn value",
    "other_code:Net --arg=width=3": "got an unexpected keyword argument 'width'",
    "other_code:Net --arg=3": "--arg wants key=value, got '3'",
    "other_code:Net --size=8": "--size wants HEIGHTxWIDTH, got '8'",
    "other_code:Net --size=0x8": "--size wants HEIGHTxWIDTH, got '0x8'",
    "other_code:Net --size=8x8 --size=8x8": "--size 8x8 is given twice",
    "other_code:Net --rename=stages=levels": "--rename stages=levels changes no key",
    "other_code:Net --rename=^stem=norm": "--rename gives two keys the name norm.",
    "other_code:Net --rename=(=x": "--rename (=x: ",
    r"other_code:Net --rename=stem=\2": r"--rename stem=\2: invalid group reference",
    "other_code:Net --computed=masks": "--computed masks is the end of no key",
    "other_code:Net --computed=bias": "bias is a parameter",
    "other_code:Net --mul=gamma=2": "--mul gamma is the end of no key",
    "other_code:Net --mul=bias=two": "--mul: could not convert string to float: 'two'",
    "other_code:Net --stage=0=sten": "no module sten; did you mean stem or tokens?",
    "other_code:Net --stage=stem": "--stage wants two parts with = between them, got 'stem'",
    "other_code:Net --stage=stem=0": "--stage wants INDEX=MODULE, got 'stem' as index",
    "other_code:Net --stage=0=stem --stage=0=head": "--stage: two modules have one index",
    "other_code:Net --stage=0=returns": "no module returns",
    "other_code:In_place --stage=0=idle": "--stage: the model does not call idle",
    "other_code:Twice --stage=0=last": "stage0: the module is called twice",
    "other_code:Net --channels-last": "--channels-last is for the modules of --stage",
    "other_code:dense --grad-gain=2": "--grad-gain: the model returns no logits",
    "other_code:Net --path=nowhere": "--path nowhere is not a folder",
    "other_code:Net --out=nowhere": "--out nowhere is not a folder",
}


@pytest.mark.parametrize("request_", REFUSED)
def test_what_cannot_be_recorded_is_refused_in_one_line(run, tmp_path, request_):
    make, *options = request_.split()
    result = run(make, *([] if "--size" in request_ else ["--size=8x8"]), *options)
    assert result.exit_code == 2
    assert REFUSED[request_] in result.stderr and result.stderr.count("\n") == 1
    assert [*tmp_path.glob("*.*")] == []


@pytest.mark.parametrize("name", ["small", "__small", "net__", "../net__small", "net__a/b"])
def test_a_golden_has_a_family_and_a_variant(run, name):
    assert f"NAME wants FAMILY__VARIANT, got {name!r}" in run("other_code:Net", name=name).stderr


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_a_golden_is_replaced_only_when_forced(run, tmp_path, suffix):
    there = tmp_path / f"net__small{suffix}"
    there.write_text("kept")
    result = run("other_code:Net", "--size=8x8")
    assert result.exit_code == 2 and f"{there} exists; --force replaces it" in result.stderr
    assert [*tmp_path.iterdir()] == [there] and there.read_text() == "kept"
    assert run("other_code:Net", "--size=8x8", "--force").exit_code == 0
    assert there.read_bytes() != b"kept" and len([*tmp_path.iterdir()]) == 2


def test_the_commit_of_the_repository_is_recorded_without_the_token(recorded, tmp_path):
    folder = tmp_path / "cloned"
    folder.mkdir()
    (folder / "cloned_code.py").write_text(OTHER_CODE)

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout

    options = {"name": "net__small", "path": folder}
    git("init")
    small = ["cloned_code:Net", "--size=8x8", "--computed=mask", "--force"]
    assert recorded(*small, **options)[0]["recorded"]["source"] == "unknown"  # git does not track the file
    git("add", "cloned_code.py")
    git("commit", "-m", "x")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD").strip()
    assert recorded(*small, **options)[0]["recorded"]["source"] == commit
    git("remote", "add", "origin", "https://me:secret@example.org/them/code.git")
    (folder / "cloned_code.py").write_text(OTHER_CODE + "\n")
    assert recorded(*small, **options)[0]["recorded"]["source"] == f"example.org/them/code {commit}-dirty"
