"""Settings shared by all tests."""

import pytest


@pytest.fixture(autouse=True)
def one_thread_per_test() -> None:
    """Tiny products gain nothing from threads, and bit-for-bit tests must not depend on them."""
    import torch

    torch.set_num_threads(1)
