"""A folder of 24 small images, and recipes of tiny models that train on it in a second."""

import signal
from collections.abc import Iterator

import pytest
from recipes import everything, few_threads, images, make_recipe  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leave the allocator of the tests' process as it is; return who asked to keep memory."""
    asked: list[str] = []
    monkeypatch.setattr("foveate.train.runner.keep_memory", lambda: asked.append("train"))
    return asked


@pytest.fixture(autouse=True)
def no_signal_is_ignored() -> Iterator[None]:
    """Undo what nohup does."""
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
    before = None if hang_up is None else signal.signal(hang_up, signal.SIG_DFL)
    yield
    if hang_up is not None:
        signal.signal(hang_up, before)
