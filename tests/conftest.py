"""Settings shared by all tests."""

import sys
from pathlib import Path

import pytest

# Helpers of the integration tests are modules beside them, not fixtures.
sys.path.insert(0, str(Path(__file__).parent / "integration"))


@pytest.fixture(autouse=True)
def one_thread_per_test() -> None:
    """Tiny products gain nothing from threads, and bit-for-bit tests must not depend on them."""
    import torch

    torch.set_num_threads(1)
