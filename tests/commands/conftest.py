"""Recipes of tiny models, for `foveate train`."""

import pytest
from recipes import few_threads, images, make_recipe  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leave the allocator of the tests' process as it is; return the commands that asked to keep memory."""
    asked: list[str] = []
    for caller in ("train.runner", "commands.demo", "commands.bench"):
        monkeypatch.setattr(f"foveate.{caller}.keep_memory", lambda caller=caller: asked.append(caller))
    return asked
