"""A folder of 24 small images, and recipes of tiny models that train on it in a second."""

import pytest
from recipes import everything, few_threads, images, make_recipe  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leave the allocator of the tests' process as it is; return who asked to keep memory."""
    asked: list[str] = []
    monkeypatch.setattr("foveate.train.runner.keep_memory", lambda: asked.append("train"))
    return asked
