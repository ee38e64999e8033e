"""A checkpoint is complete or absent, whatever happens while it is written."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from foveate.train import TrainError, export_weights, load_net, load_recipe
from foveate.train.checkpoints import find_resumable, list_epochs, read_checkpoint, write_epoch
from foveate.train.model import Classifier, build_net
from foveate.train.recipe import recipe_data


def checkpoint(epoch: int) -> dict:
    return {"meta": {"epoch": epoch}, "state_dict": {"net.w": torch.full((1000,), float(epoch))}}


def fill(work_dir: Path, epochs: int, keep: int = 2) -> None:
    for epoch in range(1, epochs + 1):
        write_epoch(work_dir, checkpoint(epoch), keep)


def write_half_and_die(work_dir: Path) -> None:
    def save(obj, file):
        file.write(b"PK\x03\x04 half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save
    write_epoch(work_dir, checkpoint(2), keep=1)


def test_a_kill_while_writing_leaves_the_complete_checkpoint(tmp_path):
    fill(tmp_path, 1, keep=1)
    child = multiprocessing.get_context("fork").Process(target=write_half_and_die, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (part,) = tmp_path.glob(".epoch_2.pth.*")
    assert (part / "epoch_2.pth").read_bytes() == b"PK\x03\x04 half a checkpoint"
    assert find_resumable(tmp_path, print) == tmp_path / "epoch_1.pth"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_1.pth", "last_checkpoint"]


def test_an_error_while_writing_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    fill(tmp_path, 1)

    def full_disk(obj, part) -> None:
        part.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_epoch(tmp_path, checkpoint(1), keep=1)
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "epoch_1.pth")["meta"]["epoch"] == 1
    assert not list(tmp_path.glob(".*"))


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    fill(tmp_path, 1, keep=1)
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append((tmp_path / "epoch_1.pth").exists()), replace(a, b)))
    write_epoch(tmp_path, checkpoint(2), keep=1)
    assert seen == [True, True] and [path.name for path in list_epochs(tmp_path)] == ["epoch_2.pth"]


def test_the_newest_are_kept_in_order_of_number_and_the_pointer_names_the_last(tmp_path):
    fill(tmp_path, 11, keep=3)
    assert [path.name for path in list_epochs(tmp_path)] == ["epoch_11.pth", "epoch_10.pth", "epoch_9.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "epoch_11.pth\n"


@pytest.mark.parametrize("damage", ["truncated", "empty"])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path, damage):
    fill(tmp_path, 2)
    newest = tmp_path / "epoch_2.pth"
    newest.write_bytes(newest.read_bytes()[: -len(newest.read_bytes()) // 2] if damage == "truncated" else b"")
    said = []
    assert find_resumable(tmp_path, said.append) == tmp_path / "epoch_1.pth"
    assert len(said) == 1 and "epoch_2.pth is truncated or damaged" in said[0] and "the previous one" in said[0]


def test_a_work_dir_with_only_damaged_checkpoints_is_refused(tmp_path):
    (tmp_path / "epoch_1.pth").write_bytes(b"PK")
    with pytest.raises(TrainError, match="all of its 1 checkpoints are damaged"):
        find_resumable(tmp_path, print)
    assert find_resumable(tmp_path / "nothing", print) is None


def test_a_checkpoint_that_could_run_code_is_refused(tmp_path):
    torch.save({"meta": {}, "state_dict": {}, "evil": Path("x")}, tmp_path / "evil.pth")
    with pytest.raises(TrainError, match=r"evil.pth needs more than tensors \(pathlib\.PosixPath\)"):
        read_checkpoint(tmp_path / "evil.pth")
    torch.save({"weights": 1}, tmp_path / "foreign.pth")
    with pytest.raises(TrainError, match="was not written by foveate train"):
        read_checkpoint(tmp_path / "foreign.pth")


@pytest.fixture
def trained(make_recipe, tmp_path) -> Path:
    recipe = load_recipe(make_recipe())
    model = Classifier(recipe, build_net(recipe))
    meta = {"epoch": 1, "recipe": recipe_data(recipe)}
    return write_epoch(tmp_path, {"meta": meta, "state_dict": model.state_dict()}, keep=1)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_exported_weights_load_into_a_plain_timm_model(trained, tmp_path, suffix):
    out = export_weights(trained, tmp_path / f"weights{suffix}")
    state = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    net = timm.create_model("test_resnet", num_classes=3)
    net.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net.eval()(x), load_net(trained)(x))


def test_exporting_to_a_place_that_cannot_be_is_refused(trained, tmp_path):
    for out, message in (
        (tmp_path / "w.bin", "ends in .safetensors or .pth"),
        (tmp_path / "a/w.pth", "does not exist"),
    ):
        with pytest.raises(TrainError, match=message):
            export_weights(trained, out)
