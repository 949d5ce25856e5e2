"""Any nested state survives the way through JSON unchanged, types included."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.runtime.state_tree import join_state, split_state

leaves = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**140), max_value=2**140)
    | st.floats()
    | st.text()
    | st.sampled_from(["$tensor", "$dict"])
    | st.lists(st.integers(-5, 5), max_size=3).map(torch.tensor)
)
keys = st.text(max_size=3) | st.integers(-3, 3) | st.sampled_from(["$tuple", "$tensor", "0", "a.b"])
trees = st.recursive(
    leaves,
    lambda children: (
        st.lists(children, max_size=4)
        | st.lists(children, max_size=4).map(tuple)
        | st.dictionaries(keys, children, max_size=4)
    ),
    max_leaves=12,
)


def through_json(tree: Any) -> Any:
    tensors, plain = split_state(tree)
    return join_state(tensors, json.loads(json.dumps(plain, allow_nan=False)))


def same(a: Any, b: Any) -> bool:
    """Equal in value, type, order and sign of zero."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return math.isnan(b) if math.isnan(a) else a.hex() == b.hex()
    return a == b


@given(tree=trees)
@settings(max_examples=300, deadline=None)
def test_any_tree_comes_back(tree: Any) -> None:
    assert same(through_json(tree), tree)


@given(tree=trees)
@settings(max_examples=100, deadline=None)
def test_a_skeleton_is_itself_a_state(tree: Any) -> None:
    """The store keeps skeletons inside its state file, so tags must survive a second split."""
    tensors, plain = split_state(tree)
    inner, outer = split_state(plain)
    assert inner == {}
    assert same(join_state(tensors, join_state({}, outer)), tree)


def test_lone_surrogates_and_control_characters_survive() -> None:
    tree = {"text": "\ud800\x00\u2028", "\ud801": 1}
    assert through_json(tree) == tree


def test_int_keys_and_str_keys_stay_apart() -> None:
    tree = {
        0: torch.zeros(1),
        "0": torch.ones(1),
        "a": {"b": torch.tensor(2)},
        "a.b": torch.tensor(3),
    }
    tensors, _ = split_state(tree)
    assert len(tensors) == 4
    assert same(through_json(tree), tree)


def test_a_tensor_reachable_twice_is_stored_once_and_stays_one() -> None:
    shared = torch.randn(3, generator=torch.Generator().manual_seed(0))
    tensors, plain = split_state({"embed": shared, "head": [shared]})
    assert list(tensors) == ["embed"]
    joined = join_state(tensors, plain)
    assert joined["embed"] is joined["head"][0]


def test_optimizer_state_of_torch_resumes_to_the_bit() -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def step(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    layer, optimizer = make()
    step(layer, optimizer)
    state = through_json({"model": layer.state_dict(), "optimizer": optimizer.state_dict()})
    state = {name: _copied(part) for name, part in state.items()}
    step(layer, optimizer)
    resumed, resumed_optimizer = make()
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    step(resumed, resumed_optimizer)
    assert torch.equal(resumed.weight, layer.weight)


def _copied(tree: Any) -> Any:
    tensors, plain = split_state(tree)
    return join_state({name: tensor.clone() for name, tensor in tensors.items()}, plain)


@pytest.mark.parametrize(
    "value",
    [np.float64(1.0), np.ones(2), {1, 2}, b"bytes", 1j, namedtuple("P", "x")(1), object()],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_kept_exactly_is_refused_by_path(value: Any) -> None:
    with pytest.raises(TypeError, match=r"features\.ema\.1 "):
        split_state({"features": {"ema": [0, value]}})


@pytest.mark.parametrize("key", [True, 1.5, None, (1,)])
def test_other_keys_are_refused(key: Any) -> None:
    with pytest.raises(TypeError, match="key of type"):
        split_state({"a": {key: 1}})


def test_a_state_that_contains_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = [loop]
    with pytest.raises(TypeError, match="contains itself"):
        split_state(loop)


def test_foreign_skeletons_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown tag"):
        join_state({}, {"$set": [1]})
    with pytest.raises(ValueError, match="not there"):
        join_state({}, {"$tensor": "missing"})
