"""Settings shared by all tests."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel is defined, so before any of them
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def one_thread_per_test() -> None:
    """Tiny products gain nothing from threads, and bit-for-bit tests must not depend on them."""
    torch.set_num_threads(1)
