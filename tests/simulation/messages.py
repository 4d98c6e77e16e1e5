"""Copies of what processes send each other.

Whatever crosses the border of a process is copied when it is sent, because gradients are views of live buffers. Most
messages are made of plain containers, arrays and dataclasses, which are copied piece by piece here, as pickling and
unpickling would copy them, in a quarter of the time. Everything else is pickled and unpickled.
"""

import enum
import io
import pickle
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from pathlib import PurePath
from types import FunctionType
from typing import Any, ClassVar

import numpy as np
import torch

Copier = Callable[[Any], Any]
HEAP_TYPE = 1 << 9
"""Flag of classes that were made by a `class` statement."""
_MISSING: Any = object()
_copiers: dict[type, Copier | None] = {}
"""Class -> how its objects are copied; None for objects that never change, and those that processes share."""
_shared: list[Any] = []
"""What the message that is being pickled shares with its sender."""


def share(kind: type) -> None:
    """Let processes share the objects of a class: messages carry the objects themselves."""
    _copiers[kind] = None
    _Pickler.dispatch_table[kind] = _pickle_shared


def copied(value: Any) -> Any:
    """Return a copy of a value, as another process gets it. Its arrays are read-only, as Ray's are."""
    kind = type(value)
    copier = _copiers.get(kind, _MISSING)
    if copier is None:
        return value
    if copier is _MISSING:
        copier = _copiers[kind] = _copier_of(kind)
        if copier is None:
            return value
    return copier(value)


def holds_arrays(value: Any) -> bool:
    """Return whether a message is large, which in a simulation means that it has arrays."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return True
    if isinstance(value, dict):
        return any(holds_arrays(part) for part in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(holds_arrays(part) for part in value)
    return _copiers.get(type(value)) in (_copy_plain, _copy_frozen) and any(
        holds_arrays(part) for part in vars(value).values()
    )


def _copy_list(values: Iterable[Any]) -> list[Any]:
    known = _copiers.get  # asked here too, because most values of most messages never change
    return [value if known(type(value), _MISSING) is None else copied(value) for value in values]


def _copy_tuple(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_copy_list(values)) if values else values


def _copy_named_tuple(values: Any) -> Any:
    return type(values)(*_copy_list(values))


def _copy_dict(values: dict[Any, Any]) -> dict[Any, Any]:
    known = _copiers.get
    return {key: value if known(type(value), _MISSING) is None else copied(value) for key, value in values.items()}


def _copy_set(values: set[Any]) -> set[Any]:
    return {copied(value) for value in values}


def _copy_array(array: np.ndarray) -> np.ndarray:
    if not array.flags.writeable and array.base is None:  # a copy already, to which nobody writes
        return array
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def _copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _copy_plain(value: Any) -> Any:
    """Copy an object whose state is its dictionary."""
    copy = object.__new__(type(value))
    state = copy.__dict__
    copiers = _copiers
    for name, part in value.__dict__.items():
        state[name] = part if copiers.get(type(part), _MISSING) is None else copied(part)
    return copy


def _copy_frozen(value: Any) -> Any:
    """Copy an object that nobody can change, unless a part of it can be changed."""
    copiers = _copiers
    state = {}
    is_fixed = True
    for name, part in value.__dict__.items():
        if copiers.get(type(part), _MISSING) is None:
            state[name] = part
        else:
            state[name] = copied(part)
            is_fixed = is_fixed and state[name] is part
    if is_fixed:
        return value
    copy = object.__new__(type(value))
    copy.__dict__.update(state)
    return copy


def _copy_by_pickle(value: Any) -> Any:
    global _shared
    before, _shared = _shared, []
    try:
        file = io.BytesIO()
        _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
        return pickle.loads(file.getvalue())
    finally:
        _shared = before


def _copier_of(kind: type) -> Copier | None:
    if issubclass(kind, (enum.Enum, type, np.generic, PurePath)):
        return None
    standard = (
        all(getattr(kind, name) is getattr(object, name) for name in ("__reduce__", "__reduce_ex__", "__getstate__"))
        and not hasattr(kind, "__setstate__")
        and not hasattr(kind, "__getnewargs__")
        and not hasattr(kind, "__getnewargs_ex__")
        and not any("__slots__" in vars(base) for base in kind.__mro__)
        and kind.__flags__ & HEAP_TYPE
    )
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return _copy_named_tuple
    if not standard:
        return _copy_by_pickle
    return _copy_frozen if is_dataclass(kind) and kind.__dataclass_params__.frozen else _copy_plain  # type: ignore


def _pickle_shared(value: Any) -> tuple[Any, ...]:
    _shared.append(value)
    return _unpickle_shared, (len(_shared) - 1,)


def _unpickle_shared(number: int) -> Any:
    return _shared[number]


def _pickle_copy(value: Any) -> tuple[Any, ...]:
    return _pickle_shared(copied(value))


class _Pickler(pickle.Pickler):
    dispatch_table: ClassVar[dict[type, Any]] = {np.ndarray: _pickle_copy, torch.Tensor: _pickle_copy}


_copiers.update(dict.fromkeys((int, float, str, bytes, bool, type(None), type, FunctionType)))
_copiers.update(
    {
        list: _copy_list,
        tuple: _copy_tuple,
        dict: _copy_dict,
        set: _copy_set,
        frozenset: None,
        np.ndarray: _copy_array,
        torch.Tensor: _copy_tensor,
    }
)
