"""One run a folder: the second command is refused, and a lock ends with its process."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from foveate.train import FolderInUseError, TrainError, train
from foveate.train.lock import NAME, RunLock


def hold(folder: Path, ready, end) -> None:
    """Hold a folder until the other end of the pipe `end` is closed or writes."""
    with RunLock(folder) as lock:
        lock.take()
        ready.send(True)
        end.recv()


@pytest.fixture
def holder(tmp_path):
    """A process that holds a folder, and the pipe that ends it."""
    context = multiprocessing.get_context("fork")
    (ready, ready_there), (end_there, end) = context.Pipe(False), context.Pipe(False)
    child = context.Process(target=hold, args=(tmp_path / "run", ready_there, end_there))
    child.start()
    assert ready.poll(60)
    yield child, end
    child.kill()
    child.join()


def test_a_second_run_is_refused_with_the_number_and_machine_of_the_first(holder, make_recipe, tmp_path, monkeypatch):
    child, end = holder
    monkeypatch.setattr("foveate.train.runner._run", lambda *args: pytest.fail("worked"))
    for resume in (False, True):
        message = (
            rf"work_dir .*run is in use by process {child.pid} on {socket.gethostname()}, since 20\d\d-.*another work"
        )
        with pytest.raises(FolderInUseError, match=message):
            train(make_recipe(), work_dir=tmp_path / "run", resume=resume)
    monkeypatch.undo()
    end.send(True)
    child.join()
    assert not (tmp_path / "run").exists()  # it wrote nothing, so the folder that it made is gone
    train(make_recipe(schedule={"epochs": 1}), work_dir=tmp_path / "run", keep_freed_memory=False)


def test_a_lock_ends_with_its_process(holder, tmp_path):
    child, _ = holder
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert (tmp_path / "run" / NAME).exists()  # only the file is left
    with RunLock(tmp_path / "run") as lock:
        lock.take()


def test_children_of_the_holder_do_not_hold_the_folder(tmp_path):
    """As loader workers, which may outlive a killed run for seconds."""
    context = multiprocessing.get_context("fork")
    with RunLock(tmp_path) as lock:
        lock.take()
        child = context.Process(target=time.sleep, args=(60,))
        child.start()
    (_, ready), (end, there) = context.Pipe(False), context.Pipe(False)
    there.send(True)
    other = context.Process(target=hold, args=(tmp_path, ready, end))
    other.start()
    other.join()
    assert other.exitcode == 0 and child.is_alive()
    child.kill()
    child.join()


def test_the_same_process_cannot_train_twice_in_a_folder_at_once(tmp_path):
    with RunLock(tmp_path / "a/b") as first, RunLock(tmp_path / "a/b") as second:
        first.take()
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()}"):
            second.take()
    assert not (tmp_path / "a").exists()


def test_a_folder_with_files_stays_and_the_lock_goes(tmp_path):
    with RunLock(tmp_path / "a") as lock:
        lock.take()
        (tmp_path / "a" / "file").touch()
    assert os.listdir(tmp_path / "a") == ["file"]


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def no_locks(handle: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("foveate.train.lock._lock", no_locks)
    with pytest.raises(TrainError, match="has no locks"), RunLock(tmp_path) as lock:
        lock.take()
