import pytest


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the tensors are tiny."""


@pytest.fixture(autouse=True, scope="module")
def calibrated():
    """Take oneDNN's products without measuring, and keep the user's file as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVEATE_PRODUCTS", "onednn")
        yield
