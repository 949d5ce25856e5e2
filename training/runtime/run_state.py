"""The state of a run as a checkpoint holds it: tensor groups beside plain values.

The model's state is flat already; every other group is a tree that is split into tensors by path
and plain JSON values (state_tree.py), and joined again on resume.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from training.runtime.restore import Checkpoint
from training.runtime.state_tree import join_state, split_state

NESTED_GROUPS = ("optimizer", "features", "run")


def split_run_state(
    state: dict[str, Any],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by group and name, and the plain rest by group."""
    tensors, plain = {"model": state["model"]}, {}
    for name in NESTED_GROUPS:
        tensors[name], plain[name] = split_state(state[name])
    return tensors, plain


def join_run_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Inverse of `split_run_state`, from a checkpoint that was read."""
    state: dict[str, Any] = {"model": checkpoint.tensors["model"]}
    for name in NESTED_GROUPS:
        state[name] = join_state(checkpoint.tensors[name], checkpoint.state[name])
    return state
