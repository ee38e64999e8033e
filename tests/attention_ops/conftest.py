"""Uninitialised memory shows itself in every test of an op. Export with free sizes, where torch can."""

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.utils.deterministic


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Fill torch.empty with NaN, so that a result nobody wrote fails its test."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def export_any_size() -> Callable:
    """A function `(module, x, sizes)`: torch.export, what it asks of free sizes being left to run time."""
    late = "prefer_deferred_runtime_asserts_over_guards"
    if late not in inspect.signature(torch.export.export).parameters:
        pytest.skip(f"torch {torch.__version__} has no {late}")
    return lambda module, x, sizes: torch.export.export(module, (x,), dynamic_shapes=(sizes,), **{late: True})
