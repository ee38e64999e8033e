"""A file or folder appears whole, or not at all."""

import errno
import os
from pathlib import Path

import pytest

from foveate._files import atomic_path


def test_a_body_that_fails_half_way_leaves_the_older_file_and_nothing_else(tmp_path):
    out = tmp_path / "net.onnx"
    out.write_text("older")
    with pytest.raises(RuntimeError), atomic_path(out) as part:
        part.write_text("half")
        assert out.read_text() == "older"
        raise RuntimeError
    assert out.read_text() == "older" and os.listdir(tmp_path) == ["net.onnx"]


def test_what_was_written_takes_the_name_at_the_end(tmp_path):
    out = tmp_path / "net.onnx"
    with atomic_path(out) as part:
        part.write_text("new")
        assert not out.exists() and part.suffix == ".onnx"
    assert out.read_text() == "new" and os.listdir(tmp_path) == ["net.onnx"]


def test_a_folder_appears_whole(tmp_path):
    with atomic_path(tmp_path / "hub") as part:
        part.mkdir()
        (part / "config.json").write_text("{}")
    assert os.listdir(tmp_path / "hub") == ["config.json"]


def test_a_new_file_may_be_read_by_those_who_may_read_its_neighbours(tmp_path):
    (tmp_path / "neighbour").write_text("")
    with atomic_path(tmp_path / "net.onnx") as part:
        part.write_text("new")
    assert len({os.stat(tmp_path / name).st_mode for name in os.listdir(tmp_path)}) == 1


def test_a_relative_name_is_a_name_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_path(Path("net.onnx")) as part:
        part.write_text("new")
    assert os.listdir() == ["net.onnx"]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    out = tmp_path / "net.onnx"
    with pytest.raises(OSError, match=r"No space left on device: '.*net.onnx'"), atomic_path(out):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"other\.bin"), atomic_path(out):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "other.bin")
    assert os.listdir(tmp_path) == []
