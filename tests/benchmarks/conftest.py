"""What tests of several benchmarks share."""

import pytest


@pytest.fixture
def without_calibration(monkeypatch, tmp_path, one_thread):
    """Measure no products, and leave the user's file of them alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FOVEATE_PRODUCTS", "torch")
