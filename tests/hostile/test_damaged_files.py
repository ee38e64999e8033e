"""Every loader raises one of our errors for a damaged or hostile file: no other type, no hang, no large allocation."""

import base64
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from foveate.export import ExportError, load_model, save_hub
from foveate.export.hub_files import check_hub_config
from foveate.export.weights import read_model_weights
from foveate.pruning import Plan, PruningError, plan
from foveate.train import TrainError, load_net, load_recipe
from foveate.train.checkpoints import find_resumable, read_checkpoint, write_epoch
from foveate.train.model import Classifier, build_net
from foveate.train.recipe import recipe_data
from foveate.train.report import read_scalars

from .pickles import legacy, pickled, plain_checkpoint, rewritten, safetensors, zipped

RECIPE = {
    "model": {"name": "test_resnet", "num_classes": 3},
    "data": {"img_size": 16},
    "optimizer": {"lr": 0.1},
    "schedule": {"epochs": 1},
}
OURS = (ExportError, PruningError, TrainError)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """A sound file of every kind, and what reads it."""
    root = tmp_path_factory.mktemp("sound")
    recipe = load_recipe(RECIPE)
    net = build_net(recipe)
    small = {"state_dict": {"a.weight": torch.randn(3, 4), "a.bias": torch.zeros(3)}, "epoch": 3, "args": (1, "x")}
    torch.save(small, root / "new.pth")
    torch.save(small, root / "old.pth", _use_new_zipfile_serialization=False)
    save_file(small["state_dict"], root / "net.safetensors")
    meta = {"epoch": 1, "iter": 2, "seed": 0, "recipe": recipe_data(recipe), "classes": ["a", "b", "c"]}
    meta |= {"processes": 1, "best": {"epoch": 1, "top1": 3.0}, "versions": {}}
    state = Classifier(recipe, net).state_dict()
    write_epoch(root, {"meta": meta, "state_dict": state, "optimizer": {}}, keep=1)
    nat = timm.create_model("nat_mini", dims=(8,), depths=(1,), head_dim=4, kernel_size=3, num_classes=2)
    plan(nat, "dimap", 0.5, structure=["mlp"], img_size=16).save(root / "plan.json")
    hub = save_hub(net, root / "hub")
    (root / "recipe.json").write_text(json.dumps(RECIPE))
    (root / "recipe.yaml").write_text(
        "model: {name: test_resnet}\ndata: {}\noptimizer: {lr: 0.1}\nschedule:\n  epochs: 1"
    )
    (root / "scalars.jsonl").write_text('{"epoch": 1, "val_top1": 3.0}\n' * 3)
    return {
        "new.pth": (root / "new.pth", read_model_weights),
        "old.pth": (root / "old.pth", read_model_weights),
        "net.safetensors": (root / "net.safetensors", read_model_weights),
        "epoch_1.pth": (root / "epoch_1.pth", read_checkpoint),
        "plan.json": (root / "plan.json", Plan.load),
        "config.json": (hub / "config.json", lambda path: check_hub_config(path.parent)),
        "recipe.json": (root / "recipe.json", load_recipe),
        "recipe.yaml": (root / "recipe.yaml", load_recipe),
        "scalars.jsonl": (root / "scalars.jsonl", read_scalars),
    }


KINDS = ["new.pth", "old.pth", "net.safetensors", "epoch_1.pth", "plan.json", "config.json"]
KINDS += ["recipe.json", "recipe.yaml", "scalars.jsonl"]
CHECKED = ("new.pth", "epoch_1.pth")  # whose formats carry checksums of all that is read


def read(files, kind: str, path: Path) -> bool:
    """Whether the file was read; anything but our errors is let through, and fails the test."""
    try:
        files[kind][1](path)
    except OURS as error:
        assert str(error).isprintable() and len(str(error)) < 2000
        return False
    return True


def damaged(data: bytes, random: random.Random) -> bytes:
    """Flip, drop, double or overwrite some bytes."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        place = random.randrange(len(data))
        kind = random.randrange(5)
        if kind == 0:
            data[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[place] = random.choice((0, 255, 127, 128, 1))
        elif kind == 2:
            del data[place : place + random.randrange(1, 9)]
        elif kind == 3:
            data[place:place] = data[place : place + random.randrange(1, 9)]
        else:
            data[place : place + 4] = struct.pack("<I", random.choice((0, 2**31 - 1, 2**32 - 1, 4096)))
        data = data or bytearray(b"x")
    return bytes(data)


def rounds(kind: str, few: int, many: int) -> list:
    return [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", rounds("", 60, 4000))
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_give_our_error_or_a_file_that_reads(kind, count, files, tmp_path):
    source = files[kind][0]
    whole, path, generator = source.read_bytes(), tmp_path / source.name, random.Random(0)
    outcomes = []
    for _ in range(count):
        path.write_bytes(damaged(whole, generator))
        outcomes.append(read(files, kind, path))
    assert kind == "scalars.jsonl" or not all(outcomes)  # the log passes over a line that is cut


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", rounds("", 150, 6000))
@pytest.mark.parametrize("kind", CHECKED)
def test_damaged_pickles_with_right_checksums_give_our_error_or_a_file_that_reads(kind, count, files, tmp_path):
    generator = random.Random(1)
    for _ in range(count):
        path = rewritten(files[kind][0], tmp_path / kind, lambda data: damaged(data, generator))
        read(files, kind, path)


@pytest.mark.parametrize("kind", CHECKED)
def test_one_flipped_bit_in_a_tensor_is_found(kind, files, tmp_path):
    source = files[kind][0]
    data = bytearray(source.read_bytes())
    with zipfile.ZipFile(source) as archive:
        entry = next(entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size)
    name = data[entry.header_offset + 26 : entry.header_offset + 30]
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", name))
    data[start + entry.file_size // 2] ^= 1
    (tmp_path / kind).write_bytes(data)
    with pytest.raises(OURS, match="is truncated or damaged, or not a checkpoint: BadZipFile: Bad CRC-32"):
        files[kind][1](tmp_path / kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scalars.jsonl"])
def test_what_is_no_file_of_this_kind_is_refused(kind, files, tmp_path):
    whole = files[kind][0].read_bytes()
    contents = [b"", b"\0", b"\xff\xfe\x00", b"PK\x03\x04", b"[]", b"3", b"null", b"NaN", b"\x80\x02.", b"\xff" * 4096]
    contents += [whole[: len(whole) * part // 10] for part in range(10)] + [b"[" * 100_000, b'{"a":' * 100_000]
    path = tmp_path / Path(kind).name
    for content in contents:
        path.write_bytes(content)
        if kind == "recipe.yaml" and whole.startswith(content):
            continue  # a shorter recipe may be whole
        assert not read(files, kind, path), content[:20]
    os.remove(path)
    assert not read(files, kind, path)
    path.mkdir()
    assert not read(files, kind, path)
    path.rmdir()
    os.mkfifo(path)
    assert not read(files, kind, path)
    if kind.endswith((".pth", "plan.json")):
        for device in ("/dev/zero", "/dev/null", "/dev/random"):
            with pytest.raises(OURS, match="is not a regular file"):
                files[kind][1](Path(device))


def test_a_device_or_pipe_beside_a_hub_configuration_is_refused(files, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_bytes(files["config.json"][0].read_bytes())
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ExportError, match="is not a regular file"):
        load_model(f"local-dir:{folder}")
    os.remove(folder / "model.safetensors")
    with pytest.raises(ExportError, match="holds no weights"):
        load_model(f"local-dir:{folder}")


WRONG = {
    "texts for tensors": {"state_dict": {"a": "x"}},
    "numbers for names": {"state_dict": {1: torch.zeros(1)}},
    "a list for a dict": {"state_dict": [torch.zeros(1)]},
    "nested": {"state_dict": {"a": {"b": torch.zeros(1)}}},
    "none": {"state_dict": None},
    "a tensor": torch.zeros(1),
    "sparse": {"state_dict": {"a": torch.eye(3).to_sparse()}},
    "meta": {"state_dict": {"a": torch.empty(3, device="meta")}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRONG)
def test_other_content_than_names_and_tensors_is_refused(name, tmp_path):
    torch.save(WRONG[name], tmp_path / "net.pth")
    with pytest.raises(ExportError, match=r"net.pth (holds no state dict|needs more than tensors|is truncated)"):
        read_model_weights(tmp_path / "net.pth")
    with pytest.raises(TrainError):
        read_checkpoint(tmp_path / "net.pth")


META = [
    {"meta": []}, {"meta": {"epoch": "3"}}, {"meta": {"recipe": 3}}, {"meta": {"recipe": {}}}, {"meta": {}},
    {"meta": {"recipe": {"model": 3}}}, {"meta": {"recipe": {"model": {"name": ["a"]}}}}, {"state_dict": {"net.a": 3}},
    {"state_dict": {}}, {"meta": {"recipe": RECIPE | {"hooks": 3}}}, {"meta": {"classes": "abc", "recipe": RECIPE}},
    {"meta": {"recipe": RECIPE | {"model": {"name": "test_resnet", "layers": "x"}}}},
]  # fmt: skip


@pytest.mark.parametrize("change", META, ids=str)
def test_a_training_checkpoint_with_wrong_types_inside_is_refused(change, tmp_path):
    state = {f"net.{name}": tensor for name, tensor in timm.create_model("test_resnet").state_dict().items()}
    torch.save({"meta": {"recipe": RECIPE}, "state_dict": state} | change, tmp_path / "net.pth")
    with pytest.raises(TrainError) as caught:
        load_net(tmp_path / "net.pth")
    assert "\n" not in str(caught.value)


PLANS = [
    ("masks", []), ("masks", {"a": {"shape": [-1], "bits": ""}}), ("masks", {"a": {"shape": [2**40], "bits": ""}}),
    ("masks", {"a": {"shape": [10**12], "bits": "AAAA"}}), ("masks", {"a": {"shape": [1.5], "bits": "AA=="}}),
    ("masks", {"a": {"shape": [8], "bits": "AAAA"}}), ("masks", {"a": {"shape": [9], "bits": "AA=="}}),
    ("masks", {"a": {"shape": [8], "bits": "?"}}), ("masks", {"a": {"shape": [True], "bits": "AA=="}}),
    ("cuts", {"a": {"0": [3, 2]}}), ("cuts", {"a": {"0": []}}), ("cuts", {"a": {"0": [-1]}}),
    ("cuts", {"a": {"9": [1]}}), ("cuts", {"a": {"x": [1]}}), ("cuts", {"a": [1]}), ("counts", {}),
    ("counts", {"params_before": "x"}), ("ratio", "x"), ("ratio", True), ("groups", {}), ("structure", "mlp"),
    ("structure", [3]), ("removed", {"mlp": [1]}), ("widths", {"a": "x"}), ("thresholds", {"a": None}),
    ("pattern", 3), ("method", None), ("version", True), ("version", "1"), ("more", 1),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), PLANS, ids=str)
def test_a_plan_with_wrong_types_inside_is_refused(key, value, files, tmp_path):
    data = json.loads(files["plan.json"][0].read_text())
    (tmp_path / "plan.json").write_text(json.dumps(data | {key: value}))
    with pytest.raises(PruningError, match=r"plan .*plan\.json is damaged or not a plan"):
        Plan.load(tmp_path / "plan.json")


def test_json_without_meaning_is_refused(files, tmp_path):
    text = files["plan.json"][0].read_text()
    for number in ("NaN", "Infinity", "-Infinity", "9" * 5000):
        (tmp_path / "plan.json").write_text(text.replace('"ratio": 0.5', f'"ratio": {number}'))
        with pytest.raises(PruningError, match="is not JSON"):
            Plan.load(tmp_path / "plan.json")


BOMBS = """
import resource, sys
from pathlib import Path
from foveate.export.weights import read_model_weights
from foveate.export import ExportError
from foveate.train import TrainError, load_recipe
import torch
torch.zeros(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        (load_recipe if path.suffix in (".yaml", ".json") else read_model_weights)(path)
    except (ExportError, TrainError) as error:
        print(path.name, "|", error)
        continue
    print(path.name, "| was read")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def sized(tensor_numel: int, stride: int, storage_numel: int) -> bytes:
    """A pickle of one tensor of so many elements, in a storage of so many."""
    from .pickles import Global, Steps, reduce

    storage = Steps(
        lambda p: (p.save(("storage", Global("torch", "FloatStorage"), "0", "cpu", storage_numel)), p.write(b"Q"))
    )
    tensor = reduce(Global("torch._utils", "_rebuild_tensor_v2"), storage, 0, (tensor_numel,), (stride,), False, {})
    return pickled({"state_dict": {"a": tensor}})


def doubled(times: int) -> bytes:
    """A tuple of two of a tuple of two ...: 2**times parts in a few bytes."""
    return b"\x80\x02)" + b"q\1h\1\x86" * times


def write_bombs(folder: Path) -> None:
    big = 2**31  # 2 GB
    with zipfile.ZipFile(folder / "deflated pickle.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w") as file:
            for _ in range(100):
                file.write(bytes(2**20))
    with zipfile.ZipFile(folder / "deflated storage.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", sized(25 * 2**20, 1, 25 * 2**20))
        with archive.open("archive/data/0", "w") as file:
            for _ in range(100):
                file.write(bytes(2**20))
    for name, numbers in {
        "storage that is not there": (big, 1, big),
        "short storage": (8, 1, 8),
        "expanded": (big, 0, 1),
        "past its storage": (2, 1, 1),
        "far offset": (2, 2**61, 1),
    }.items():
        with zipfile.ZipFile(folder / f"{name}.pth", "w") as archive:
            archive.writestr("archive/data.pkl", sized(*numbers))
            archive.writestr("archive/data/0", bytes(4))
    opcodes = {
        "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40),
        "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**40),
        "long bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**33),
        "long frame": b"\x80\x04\x95" + struct.pack("<Q", 2**40),
        "long number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1),
        "far memo": b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".",
        "shared parts": doubled(60) + b".",
        "shared parts as a key": b"\x80\x02}" + doubled(60)[2:] + b"Ns.",
        "deep": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
        "itself": b"\x80\x02]q\0h\0a.",
    }
    for name, data in opcodes.items():
        zipped(data, folder / f"{name}.pth")
        legacy(3, folder / f"{name} legacy.pth")
        head = (folder / f"{name} legacy.pth").read_bytes()
        (folder / f"{name} legacy.pth").write_bytes(head[: head.index(pickled(3) + pickled([]))] + data)
    for name, length in {"huge": 2**63, "larger": 2**40, "all": 2**64 - 1, "short": 1}.items():
        safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', folder / f"{name}.safetensors", length)
    for name, entry in {
        "shape": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]},
        "offsets": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        "negative": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        "dtype": {"dtype": "X1", "shape": [1], "data_offsets": [0, 4]},
    }.items():
        safetensors(json.dumps({"a": entry}).encode(), folder / f"{name} entry.safetensors", data=bytes(4))
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    (folder / "aliases.yaml").write_text("\n".join(lines))
    (folder / "itself.yaml").write_text("model: &a\n  name: *a\n")
    (folder / "deep.yaml").write_text("[" * 5000)
    (folder / "deep.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)


def test_bombs_are_refused_before_they_take_memory_or_time(tmp_path):
    (tmp_path / "bombs").mkdir()
    write_bombs(tmp_path / "bombs")
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # noqa: E731 - a hang ends the process
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(tmp_path / "bombs")], capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, megabytes = done.stdout.splitlines()
    assert len(lines) == len(list((tmp_path / "bombs").iterdir()))
    assert [line for line in lines if "was read" in line] == []
    assert int(megabytes) < 300


def test_a_work_dir_of_damaged_checkpoints_is_said_to_be_one(tmp_path):
    for epoch, content in enumerate((b"PK", b"", pickle.dumps({"meta": {}, "state_dict": {}})), 1):
        (tmp_path / f"epoch_{epoch}.pth").write_bytes(content)
    os.mkfifo(tmp_path / "epoch_4.pth")
    said = []
    with pytest.raises(TrainError, match="all of its 4 checkpoints are damaged"):
        find_resumable(tmp_path, said.append)
    assert len(said) == 4 and "is not a regular file" in said[0]


def test_a_message_from_a_file_is_one_line_without_control_characters(tmp_path):
    torch.save({"state_dict": {"evil\x1b[31m\nname": 3}}, tmp_path / "net.pth")
    with pytest.raises(ExportError) as caught:
        read_model_weights(tmp_path / "net.pth")
    assert str(caught.value).isprintable()
    zipped(b"\x80\x02cevil\x1b[31m\x07 module\nname\n.", tmp_path / "net.pth")
    with pytest.raises(ExportError) as caught:
        read_model_weights(tmp_path / "net.pth")
    assert str(caught.value).isprintable()


def test_sound_files_are_read(files, tmp_path):
    assert all(read(files, kind, files[kind][0]) for kind in KINDS)
    assert read_model_weights(plain_checkpoint(tmp_path / "net.pth")).keys() == {"weight", "bias"}
    assert base64.b64decode(json.loads(files["plan.json"][0].read_text())["masks"].popitem()[1]["bits"])
