"""Safe loading of pickles.

``pickle.load`` calls any function that the file names. The model zoo and the proposal files of
Detectron2 are pickles that need only arrays, strings, numbers, None and plain containers; every
other class or function is refused.

NumPy's own reconstruction functions are replaced, because the saved state of a data type can
declare raw bytes to be an array of Python objects.
"""

import contextlib
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
from detectron2.structures import BoxMode

from ..errors import UserError

__all__ = ["RefusedPickle", "load_plain_pickle", "plain_pickles"]

_KINDS = "biufcSU"  # NumPy dtype kinds: booleans, numbers and strings
_LATIN1 = "latin1"  # encoding of the byte strings of Python 2


class RefusedPickle(UserError):
    """A pickle needs more than arrays, strings, numbers and plain containers."""


class _DataType:
    """Stand-in for `numpy.dtype` that rejects object types."""

    def __init__(self, name: str, align: bool = False, copy: bool = False) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in _KINDS:
            raise RefusedPickle(f"an array of type {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """Array that checks its saved state before NumPy restores it."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, described, is_fortran, data = state
        dtype, data = _checked(described), _as_bytes(data)
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} has {len(data)} bytes")
        super().__setstate__((version, shape, dtype, is_fortran, data))


def _checked(described: Any) -> np.dtype:
    if not isinstance(described, _DataType):
        raise ValueError(f"{described!r:.40} stands for the type of an array")
    return described.dtype


def _as_bytes(data: Any) -> bytes:
    return data.encode(_LATIN1) if isinstance(data, str) else bytes(data)


def _empty_array(*_: Any) -> np.ndarray:
    return np.ndarray.__new__(_Array, (0,), np.int8)


def _scalar(described: _DataType, data: Any) -> np.generic:
    return np.frombuffer(_as_bytes(data), _checked(described), 1)[0]


def _from_buffer(
    data: Any, described: _DataType, shape: tuple[int, ...], order: str, *_: Any
) -> np.ndarray:
    array = np.frombuffer(bytes(data), _checked(described)).reshape(shape, order=order)
    return array.astype(array.dtype.newbyteorder("="))  # a copy, as bytes cannot be written to


def _box_mode(number: int) -> BoxMode:
    return BoxMode(int(number))


def _no_bytes() -> bytes:  # older protocols call bytes() for b""
    return b""


def _encode(text: str, encoding: str) -> bytes:
    if encoding != _LATIN1:
        raise RefusedPickle(f"the encoding {encoding}")
    return text.encode(_LATIN1)


_ADMITTED = {
    ("numpy", "dtype"): _DataType,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct, never called
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
    ("detectron2.structures.boxes", "BoxMode"): _box_mode,  # in proposal files
    **{
        (module, name): cls
        for module in ("builtins", "__builtin__")
        for name, cls in (
            *(("set", set), ("frozenset", frozenset), ("complex", complex)),
            ("bytes", _no_bytes),
        )
    },
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _empty_array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise RefusedPickle(f"{module}.{name}") from None


def load_plain_pickle(file: BinaryIO, encoding: str = _LATIN1) -> Any:
    """Return the object of a pickle that holds plain data only.

    Args:
        file: binary file, open for reading.
        encoding: encoding of the strings of Python 2.

    Raises:
        RefusedPickle: the pickle needs another class or function; it is not called.
        Exception: the pickle is damaged, as with ``pickle.load``.
    """
    try:
        return _PlainUnpickler(file, encoding=encoding).load()
    except RefusedPickle as error:
        raise RefusedPickle(
            f"{getattr(file, 'name', 'the pickle')} names {error}, which is refused: a pickle "
            "from outside may hold arrays, strings, numbers and plain containers only"
        ) from None


@contextlib.contextmanager
def plain_pickles(module: ModuleType) -> Iterator[None]:
    """Replace ``pickle.load`` of a Detectron2 module by `load_plain_pickle` inside the context.

    Args:
        module: module that imports ``pickle``.
    """
    original = module.pickle
    module.pickle = SimpleNamespace(load=load_plain_pickle)
    try:
        yield
    finally:
        module.pickle = original
