"""Opens a sandbox for a test, or skips it where this machine cannot have that kind."""

from __future__ import annotations

import os
import shutil

import pytest

from training.rl.sandbox import Sandbox, open_sandbox
from training.rl.sandbox_job import SandboxUnavailable

TOOLS_REQUIRED = "SIGMA_REQUIRE_TOOLS"  # set where the tools are installed for the tests


def open_or_skip(kind: str | None = None, *, num_workers: int = 1) -> Sandbox:
    """A sandbox; where the tools were to be installed, a missing bwrap fails instead of skipping.

    A kernel that denies namespaces is no missing tool: then this kind is skipped, and the tests
    of the other kind must run.
    """
    try:
        return open_sandbox(kind=kind, num_workers=num_workers)
    except SandboxUnavailable as error:
        required = os.environ.get(TOOLS_REQUIRED) == "1"
        if required and (kind != "bubblewrap" or shutil.which("bwrap") is None):
            raise
        pytest.skip(str(error))
