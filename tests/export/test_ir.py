"""OpenVINO: no telemetry, errors in one line, and an IR whose two files are always of one export."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import foveate
from foveate._files import atomic_path
from foveate.export import ExportError, export_onnx, export_openvino, ir, open_file
from foveate.export.formats import Format, Request, write_verified
from foveate.export.ir import plain_errors

X = torch.zeros(2, 3, 16, 16)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


SILENT = """
import atexit, os, socket, sys
from pathlib import Path
log = Path("connections").resolve()  # a file: the telemetry forks a process for each message
log.touch()
def refuse(*args, **kwargs):
    log.write_text(f"{args}")
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
atexit.register(lambda: print("home", os.listdir(os.environ["HOME"])))  # after threads that send
import torch
from foveate.export import open_file
from foveate.export.ir import write_openvino
write_openvino(Path("net.onnx"), Path("net.xml"), None)
print(open_file("net.xml").run(torch.randn(3, 3, 16, 16))[0].shape)
assert "openvino" in sys.modules and "openvino_telemetry" not in sys.modules
"""


@pytest.mark.parametrize("loaded", [True, False])
def test_openvino_is_imported_as_if_its_telemetry_were_missing(loaded, tmp_path, monkeypatch):
    package = tmp_path / "openvino"
    package.mkdir()
    imports = "try:\n    import openvino_telemetry as telemetry\nexcept ImportError:\n    telemetry = None\n"
    (package / "__init__.py").write_text(imports)
    (tmp_path / "openvino_telemetry.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0].startswith("openvino")]:
        monkeypatch.delitem(sys.modules, name)
    if loaded:
        monkeypatch.setitem(sys.modules, "openvino_telemetry", sys)
    assert ir.import_openvino().telemetry is None
    assert sys.modules.get("openvino_telemetry") is (sys if loaded else None)
    assert sys.modules.pop("openvino").__file__ == str(package / "__init__.py")


@pytest.mark.slow
def test_export_and_inference_open_no_socket_and_leave_the_home_alone(tmp_path):
    pytest.importorskip("openvino")
    (tmp_path / "home").mkdir()
    export_onnx(small(), tmp_path / "net.onnx", example=X)
    of_ci = ("CI", "TF_BUILD", "JENKINS_URL")  # where the telemetry is off
    environment = {key: value for key, value in os.environ.items() if key not in of_ci} | {"HOME": f"{tmp_path}/home"}
    command = [sys.executable, "-W", "ignore", "-c", SILENT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torch.Size([3, 4])" in done.stdout and "home []" in done.stdout
    assert (tmp_path / "connections").read_text() == ""


def test_errors_do_not_name_source_files_of_openvino():
    with pytest.raises(RuntimeError) as caught, plain_errors():
        raise RuntimeError(
            "Exception from src/inference/a.cpp:1:\nCheck 'x == 1' failed at src/b.cpp:2:\nno such shape"
        )
    assert str(caught.value) == "no such shape"
    with pytest.raises(RuntimeError, match=r"Exception from src/a\.cpp:1"), plain_errors():
        raise RuntimeError("Exception from src/a.cpp:1")


def test_a_batch_of_another_shape_is_refused_in_plain_words(tmp_path):
    pytest.importorskip("openvino")
    run = open_file(export_openvino(small(), tmp_path / "net.xml", example=X)).run
    for shape in ((2, 5, 16, 16), (2, 3, 9, 16), (3, 16, 16)):
        with pytest.raises(ExportError) as caught:
            run(torch.zeros(*shape))
        assert str(caught.value) == f"the file takes images (any, 3, 16, 16), got {shape}"
    assert run(torch.zeros(5, 3, 16, 16))[0].shape == (5, 4)
    (tmp_path / "net.bin").write_bytes(b"")
    with pytest.raises(ExportError, match=r"net\.xml cannot be read: (?!Exception|Check)"):
        open_file(tmp_path / "net.xml")


def write_pair(folder, text: str) -> None:
    with atomic_path(folder / "net.v1.xml", beside=".bin") as part:
        part.write_text(text)
        part.with_suffix(".bin").write_text(text)


def read_pair(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def pair(text: str) -> dict[str, str]:
    return {"net.v1.bin": text, "net.v1.xml": text}


def test_two_files_are_replaced_together(tmp_path):
    write_pair(tmp_path, "one")
    write_pair(tmp_path, "two")
    assert read_pair(tmp_path) == pair("two")
    with atomic_path(tmp_path / "net.v1.xml", beside=".bin") as part:  # which may write one file
        part.write_text("three")
    assert read_pair(tmp_path) == pair("two") | {"net.v1.xml": "three"}


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("renames", range(5))
@pytest.mark.parametrize("older", [True, False])
def test_an_interruption_between_the_renames_keeps_the_older_pair(older, renames, error, tmp_path, monkeypatch):
    if older:
        write_pair(tmp_path, "older")
    plain, done = os.replace, []

    def interrupted(*paths):
        if len(done) == renames:
            raise error
        done.append(paths)
        plain(*paths)

    monkeypatch.setattr("os.replace", interrupted)
    survives = renames >= (4 if older else 2)
    if survives:
        write_pair(tmp_path, "newer")
    else:
        with pytest.raises(type(error)):
            write_pair(tmp_path, "newer")
    assert read_pair(tmp_path) == (pair("newer") if survives else pair("older") if older else {})


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_process_that_is_killed_between_the_renames_leaves_no_graph_beside_other_weights(tmp_path):
    code = """
import os, signal, sys, types
from pathlib import Path
package = types.ModuleType("foveate")  # without torch
package.__path__ = [sys.argv[3]]
sys.modules["foveate"] = package
from foveate._files import atomic_path
folder, after, plain, done = Path(sys.argv[1]), int(sys.argv[2]), os.replace, []
def killed(*paths):
    if len(done) == after:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(paths)
    plain(*paths)
os.replace = killed
with atomic_path(folder / "net.v1.xml", beside=".bin") as part:
    part.write_text("newer")
    part.with_suffix(".bin").write_text("newer")
"""
    for after in range(1, 4):
        folder = tmp_path / str(after)
        folder.mkdir()
        write_pair(folder, "older")
        root = str(Path(foveate.__file__).parent)
        done = subprocess.run([sys.executable, "-c", code, str(folder), str(after), root], capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        found = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
        assert "net.v1.xml" not in found, after


@pytest.mark.skipif(os.name == "nt", reason="folders have no locks on Windows")
def test_a_second_writer_waits_for_both_files_of_the_first(tmp_path, monkeypatch):
    write_pair(tmp_path, "older")
    plain, second = os.replace, []

    def replace(path, place):
        plain(path, place)
        if place.parent == tmp_path and place.suffix == ".bin" and not second:  # between the two files
            second.append(threading.Thread(target=write_pair, args=(tmp_path, "second")))
            second[0].start()
            second[0].join(0.5)
            assert second[0].is_alive()

    monkeypatch.setattr("os.replace", replace)
    write_pair(tmp_path, "first")
    second[0].join()
    assert read_pair(tmp_path) == pair("second")


@pytest.mark.parametrize("limit_bytes", [100, 2000])
def test_a_disk_that_fills_up_while_ir_is_written_is_an_error(limit_bytes, tmp_path, monkeypatch):
    """The limit of a file's size stands for the disk's."""
    resource = pytest.importorskip("resource")  # not on Windows
    pytest.importorskip("openvino")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    plain = ir.write_openvino

    def on_a_full_disk(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
        try:
            plain(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr("foveate.export.converters.write_openvino", on_a_full_disk)
    request = Request(small(), tmp_path / "net.xml", Format.OPENVINO)
    monkeypatch.setattr("foveate.export.formats.write", lambda r, part: export_openvino(r.model, part, example=X))
    with pytest.raises((OSError, ExportError)) as caught:
        write_verified(request, torch.randn(4, 3, 16, 16), 1e-4)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []
