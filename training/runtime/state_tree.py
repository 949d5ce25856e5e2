"""Nested state dictionaries as flat tensors plus a skeleton that JSON carries exactly.

A checkpoint holds no pickle, so what pickle would have kept must be spelled out: the type of a
dictionary's keys, tuples, non-finite floats, one tensor that is reachable by two paths. Whatever
JSON cannot say becomes a one-key object `{"$kind": payload}`:

    $tensor  name in the tensor dictionary        $float  "nan", "inf" or "-inf"
    $tuple   list of items                        $dict   list of [key, value] pairs
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_TAGS = frozenset({"$tensor", "$tuple", "$dict", "$float"})


def split_state(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Tensors by path (not copied) and the JSON-able rest of a nested state.

    Allowed: dict with str or int keys, list, tuple, None, bool, int, float, str, Tensor.
    TypeError names the path of anything else, so nothing is ever changed silently.
    """
    splitter = _Splitter()
    plain = splitter.split(tree, ())
    return splitter.tensors, plain


def join_state(tensors: dict[str, Tensor], plain: Any) -> Any:
    """Inverse of `split_state`; ValueError when the skeleton is not one of its."""
    if isinstance(plain, list):
        return [join_state(tensors, item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if len(plain) == 1:
        ((tag, payload),) = plain.items()
        if tag in _TAGS:
            return _join_tagged(tensors, tag, payload)
        if tag.startswith("$"):
            raise ValueError(f"saved state has an unknown tag {tag!r}")
    return {key: join_state(tensors, value) for key, value in plain.items()}


class _Splitter:
    """One walk over a tree, with the names given so far."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._open: set[int] = set()

    def split(self, value: Any, path: tuple[str, ...]) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, Tensor):
            return {"$tensor": self._name(value, path)}
        if not isinstance(value, (dict, list, tuple)) or hasattr(value, "_fields"):
            raise TypeError(
                f"state at {_shown(path)} is a {type(value).__name__}; a checkpoint holds only "
                "dict, list, tuple, None, bool, int, float, str and Tensor"
            )
        if id(value) in self._open:
            raise TypeError(f"state at {_shown(path)} contains itself")
        self._open.add(id(value))
        plain = self._split_container(value, path)
        self._open.remove(id(value))
        return plain

    def _split_container(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return self._split_dict(value, path)
        items = [self.split(item, (*path, str(index))) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}

    def _split_dict(self, value: dict[Any, Any], path: tuple[str, ...]) -> Any:
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(
                    f"state at {_shown(path)} has a key of type {type(key).__name__}; "
                    "only str and int keys can be saved"
                )
        pairs = [(key, self.split(item, (*path, str(key)))) for key, item in value.items()]
        # A lone key with a dollar would read back as a tag, an int key as a str.
        if all(type(key) is str and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$dict": [[key, item] for key, item in pairs]}

    def _name(self, tensor: Tensor, path: tuple[str, ...]) -> str:
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        wanted = ".".join(path) or "tensor"
        name, number = wanted, 1
        while name in self.tensors:  # {"a.b": x, "a": {"b": y}} or {0: x, "0": y}
            number += 1
            name = f"{wanted}~{number}"
        self.tensors[name] = tensor
        self._names[id(tensor)] = name
        return name


def _join_tagged(tensors: dict[str, Tensor], tag: str, payload: Any) -> Any:
    if tag == "$tensor":
        if payload not in tensors:
            raise ValueError(f"saved state refers to a tensor {payload!r} that is not there")
        return tensors[payload]
    if tag == "$tuple":
        return tuple(join_state(tensors, item) for item in payload)
    if tag == "$float":
        return _NON_FINITE[payload]
    return {key: join_state(tensors, value) for key, value in payload}


def _shown(path: tuple[str, ...]) -> str:
    return ".".join(path) or "its root"
