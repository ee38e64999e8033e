"""Uninitialised memory shows itself in every test of an op."""

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
