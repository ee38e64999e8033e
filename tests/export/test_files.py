"""A path that cannot be written to is refused."""

from pathlib import Path

import pytest

from foveate.export import ExportError
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
