"""What all tests share: the number of threads, and the official code's outputs."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDENS = Path(__file__).parent / "goldens"

THREADS_ARE_GIVEN = "OMP_NUM_THREADS" in os.environ  # torch reads it by itself

if not THREADS_ARE_GIVEN:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_configure(config: pytest.Config) -> None:
    """Import MMEngine before pytest-xdist starts its processes: what it imports, yapf, writes a cache on first use.

    Two processes that do so at once read each other's half-written file, and collect no tests (EOFError).
    """
    if not hasattr(config, "workerinput"):
        import mmengine.config  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests that take minutes: at the end, one process would wait for them."""
    items.sort(key=lambda item: item.path.name not in ("test_own_processes.py", "test_timm_contract.py"))


@pytest.fixture(scope="module")
def one_thread():
    """One thread unless OMP_NUM_THREADS is set: on tiny tensors, more threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if THREADS_ARE_GIVEN else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def det():
    """The generator of the goldens' weights and inputs."""
    spec = importlib.util.spec_from_file_location("det", GOLDENS / "det.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden():
    """A function from a golden's name to its JSON and its arrays."""

    def load(name: str):
        arrays = GOLDENS / f"{name}.npz"
        return json.loads((GOLDENS / f"{name}.json").read_text()), np.load(arrays) if arrays.exists() else None

    return load


def samples(array: np.ndarray, count: int) -> np.ndarray:
    flat = np.ascontiguousarray(array).ravel()
    return flat if flat.size <= count else flat[np.linspace(0, flat.size - 1, count).astype(int)]


@pytest.fixture(scope="session")
def relative_error():
    """A function from one of our tensors and a golden's samples of it to max |difference| / max |golden|."""

    def measure(ours: torch.Tensor, theirs: np.ndarray, count: int = 1024) -> float:
        return float(np.abs(samples(ours.detach().numpy(), count) - theirs).max() / np.abs(theirs).max())

    return measure
