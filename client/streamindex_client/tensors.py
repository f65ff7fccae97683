"""Tensors as rows of bytes, and answers as tensors.

numpy arrays and torch tensors are taken as they are; torch is never imported, only recognised when the caller has
imported it. Bytes are views of the tensor: a copy is made only of what is not contiguous or not on the host, and only
chunk by chunk.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamindex_client.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

__all__ = [
    "Rows",
    "bf16_maker_like",
    "float_rows",
    "index_rows",
    "is_tensor",
    "maker_like",
    "position_rows",
    "unsigned",
]


@dataclass(frozen=True, slots=True)
class Rows:
    """The first axis of a tensor, as bytes."""

    tensor: Any
    count: int
    row_bytes: int

    def view(self, start: int, stop: int) -> memoryview:
        """The bytes of rows start to stop - 1, row-major; a view of the tensor where its layout allows."""
        part = self.tensor[start:stop]
        if isinstance(part, np.ndarray):
            octets: npt.NDArray[np.uint8] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        else:
            flat = part.detach().contiguous().cpu().reshape(-1)
            octets = flat.view(sys.modules["torch"].uint8).numpy()
        return octets.data


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_tensor(value: Any) -> bool:
    """Whether a value is one tensor, not an iterator of chunks."""
    return _is_torch(value) or isinstance(value, np.ndarray) or hasattr(value, "__array__")


def float_rows(
    argument: str, value: Any, shape: tuple[int | None, ...], names: tuple[str, ...], axes: str = ""
) -> Rows:
    """Check one tensor and give its rows.

    `shape` has None where any length will do; `names` are the dtypes allowed; `axes` names the axes in messages.
    Raises InputError naming the argument, what came and what was expected.
    """
    if not _is_torch(value) and not isinstance(value, np.ndarray):
        if not hasattr(value, "__array__"):
            raise InputError(argument, f"got {type(value).__name__}, expected a numpy array or a torch tensor")
        value = np.asarray(value)
    name = str(value.dtype).removeprefix("torch.") if _is_torch(value) else value.dtype.name
    wanted = "[" + ", ".join(axes.split() or ["?" if n is None else str(n) for n in shape]) + "]"
    got = list(value.shape)
    if len(got) != len(shape) or any(n is not None and n != m for n, m in zip(shape, got, strict=True)):
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(argument, f"has shape {got}, expected {wanted} = [{sizes}]")
    if name not in names:
        raise InputError(argument, f"has dtype {name}, expected {' or '.join(names)}")
    if isinstance(value, np.ndarray):
        if not value.dtype.isnative:
            value = value.astype(value.dtype.newbyteorder("="))
        width = value.dtype.itemsize
    else:
        width = value.element_size()
    return Rows(value, got[0], width * int(np.prod(got[1:], dtype=np.int64)))


def position_rows(argument: str, value: Any, count: int | None) -> Rows:
    """Token positions, any integer type, as int64 rows. Raises InputError for another shape or a negative one."""
    if _is_torch(value):
        value = value.detach().cpu().numpy()
    array: npt.NDArray[Any] = np.asarray(value)
    if array.ndim != 1 or (count is not None and len(array) != count):
        wanted = "rows" if count is None else str(count)
        raise InputError(argument, f"has shape {list(array.shape)}, expected [{wanted}], a position for each row of q")
    if array.dtype.kind not in "iu" and array.size:
        raise InputError(argument, f"has dtype {array.dtype.name}, expected an integer type")
    if array.size and (array.min() < 0 or int(array.max()) > np.iinfo(np.int64).max):
        raise InputError(argument, "holds a negative number or one of 2^63 or more")
    return Rows(np.ascontiguousarray(array, np.int64), len(array), 8)


def maker_like(value: Any) -> Callable[[npt.NDArray[Any]], Any]:
    """How to hand answers to a caller who passed `value`: torch tensors on its device, or numpy arrays as they are."""
    if not _is_torch(value):
        return _unchanged
    torch, device = sys.modules["torch"], value.device

    def make(array: npt.NDArray[Any]) -> Any:
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)

    return make


def bf16_maker_like(value: Any) -> Callable[[npt.NDArray[Any]], Any]:
    """How to hand out the bits of bf16, as uint16, to a caller who passed `value`, of bf16 or of its bits: in its own
    element type."""
    if not _is_torch(value):
        dtype = value.dtype if isinstance(value, np.ndarray) else np.asarray(value).dtype
        return lambda array: array.view(dtype)
    make, dtype = maker_like(value), value.dtype
    # torch knows int16 in every version, and reads it as any type of the same width
    return lambda array: make(array.view("<i2")).view(dtype)


def index_rows(argument: str, value: Any, count: int, width: int | None) -> Rows:
    """Indices [count, width] of any integer type as int32 rows. Raises InputError for another shape, or for one that
    int32 does not hold."""
    if _is_torch(value):
        value = value.detach().cpu().numpy()
    array: npt.NDArray[Any] = np.asarray(value)
    if array.ndim != 2 or len(array) != count or (width is not None and array.shape[1] != width):
        wanted = "any" if width is None else str(width)
        raise InputError(argument, f"has shape {list(array.shape)}, expected [rows, entries] = [{count}, {wanted}]")
    if array.dtype.kind not in "iu":
        raise InputError(argument, f"has dtype {array.dtype.name}, expected an integer type")
    bounds = np.iinfo(np.int32)
    if array.size and (int(array.min()) < bounds.min or int(array.max()) > bounds.max):
        raise InputError(argument, "holds a number that int32 does not")
    return Rows(np.ascontiguousarray(array, np.int32), count, 4 * array.shape[1])


def _unchanged(array: npt.NDArray[Any]) -> Any:
    return array


def unsigned(argument: str, value: Any, bits: int, minimum: int = 0) -> int:
    """An integer of `minimum` to 2^bits - 1. Raises InputError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(argument, f"got {value!r}, expected an integer")
    number = value.__index__()
    if not minimum <= number < 1 << bits:
        raise InputError(argument, f"got {number}, expected {minimum} to 2^{bits} - 1")
    return int(number)
