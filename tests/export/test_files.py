"""A path that cannot be written to is refused."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from foveate._files import atomic_path, text_lines
from foveate.export import ExportError
from foveate.export.converters import write_aoti
from foveate.export.files import check_empty_folder, check_target


def test_a_relative_name_is_a_name_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_target(Path("net.onnx"), ".onnx") is None


@pytest.mark.parametrize("check", [lambda out: check_target(out, ""), check_empty_folder])
def test_a_folder_that_does_not_exist_is_named(check, tmp_path):
    with pytest.raises(ExportError, match=r"the folder .*gone does not exist"):
        check(tmp_path / "gone" / "net")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "hub").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not an empty folder"):
        check_empty_folder(tmp_path / "hub")


def test_the_weights_of_an_ir_replace_no_other_file(tmp_path):
    (tmp_path / "net.bin").write_bytes(b"a checkpoint")
    with pytest.raises(ExportError, match=r"net\.xml: its weights would replace .*net\.bin"):
        check_target(tmp_path / "net.xml", ".xml")
    (tmp_path / "net.xml").touch()  # now the two are an older IR
    check_target(tmp_path / "net.xml", ".xml")
    check_target(tmp_path / "net.onnx", ".onnx")


@pytest.mark.parametrize("check", [lambda out: check_target(out, ""), check_empty_folder])
def test_a_folder_without_write_permission_is_refused_before_the_work(check, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ExportError, match=f"no write permission for {tmp_path}"):
        check(tmp_path / "net")


def test_the_longest_name_of_a_file_can_be_written(tmp_path):
    out = tmp_path / ("図" * 85)  # 255 bytes
    with atomic_path(out) as part:
        part.write_text("x")
    assert out.read_text() == "x" and list(tmp_path.iterdir()) == [out]


def test_lines_end_as_on_any_system_and_nowhere_else():
    assert text_lines("\ufeffa\r\nb\rc\u2028d\x85\n") == ["a", "b", "c\u2028d\x85", ""]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's device that is always full")
def test_a_disk_that_fills_up_while_a_package_is_written_is_an_error():
    """torch's own writer ends the process there."""
    program = torch.export.export(nn.Linear(4, 4), (torch.zeros(2, 4),))
    with pytest.raises(OSError, match="No space left"):
        write_aoti(program, Path("/dev/full"), None)
