"""One checked problem of sparse attention, as every implementation receives it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from streamindex_service.ops.kv_rows import KvRows
from streamindex_service.ops.paged_kv_rows import PlacedKvRows


@dataclass(frozen=True)
class Limits:
    """The sizes that the operation takes."""

    min_heads: int = 1
    max_heads: int = 128
    min_value_dim: int = 16
    max_value_dim: int = 512  # a power of two
    tail_dims: tuple[int, ...] = (0, 16, 32, 64)  # elements of a key that are not part of the value
    max_width: int = 1 << 24
    max_rows: int = 2**31 - 1


LIMITS = Limits()


class AttentionInputError(ValueError):
    """An argument the operation cannot take; `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class Problem:
    """Checked inputs and the places for the outputs.

    q: [tokens, heads, key_dim] bf16; indices: [tokens, width] int32, or int64 of placed rows; sink: [heads] float32 or
    None.
    out: [tokens, heads, value_dim] bf16; out_lse: [tokens, heads] float32 or None. All contiguous.
    ends: [tokens] int32, one past the last entry of each index row that may be valid, or None.
    """

    q: Tensor
    kv: KvRows | PlacedKvRows
    indices: Tensor
    scale: float
    sink: Tensor | None
    out: Tensor
    out_lse: Tensor | None
    ends: Tensor | None = None

    @property
    def placed(self) -> bool:
        """Whether entries are places, not numbers of rows."""
        return isinstance(self.kv, PlacedKvRows)

    @property
    def tokens(self) -> int:
        """Query tokens."""
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.q.shape[1]

    @property
    def key_dim(self) -> int:
        """Elements of a key."""
        return self.q.shape[2]

    @property
    def value_dim(self) -> int:
        """Elements of a value: the first of its key."""
        return self.out.shape[2]

    @property
    def width(self) -> int:
        """Entries of a row of indices."""
        return self.indices.shape[1]


def check_inputs(q: Tensor, kv: KvRows | PlacedKvRows, indices: Tensor, sink: Tensor | None, value_dim: int) -> None:
    """Raise AttentionInputError for the first argument that disagrees with another one or with LIMITS."""
    if q.dim() != 3 or q.dtype != torch.bfloat16 or not q.is_contiguous():
        raise AttentionInputError(
            "q", f"expected contiguous [tokens, heads, key_dim] bf16, got {list(q.shape)} {q.dtype}"
        )
    tokens, heads, key_dim = q.shape
    if not LIMITS.min_heads <= heads <= LIMITS.max_heads:
        raise AttentionInputError("q", f"{heads} heads, limits are {LIMITS.min_heads} to {LIMITS.max_heads}")
    if q.data_ptr() % 16:
        raise AttentionInputError("q", "its address is not a multiple of 16 bytes")
    if key_dim != kv.key_dim:
        raise AttentionInputError("q", f"key_dim {key_dim}, the rows have {kv.key_dim}")
    if not LIMITS.min_value_dim <= value_dim <= LIMITS.max_value_dim or value_dim & (value_dim - 1):
        raise AttentionInputError("value_dim", f"{value_dim}, limits are powers of two from 16 to 512")
    if key_dim - value_dim not in LIMITS.tail_dims:
        raise AttentionInputError("value_dim", f"{value_dim} of a key_dim of {key_dim}: may differ by 0, 16, 32 or 64")
    placed = isinstance(kv, PlacedKvRows)
    _check_indices(indices, tokens, torch.int64 if placed else torch.int32)
    if not placed and kv.rows > LIMITS.max_rows:
        raise AttentionInputError("kv", f"{kv.rows} rows, the most is {LIMITS.max_rows}")
    if sink is not None and (tuple(sink.shape) != (heads,) or sink.dtype != torch.float32 or not sink.is_contiguous()):
        raise AttentionInputError("sink", f"expected contiguous [{heads}] float32, got {list(sink.shape)} {sink.dtype}")
    for name, tensor in (("kv", kv.data), ("indices", indices), ("sink", sink)):
        if tensor is not None and tensor.device != q.device:
            raise AttentionInputError(name, f"not on {q.device}, where q is")


def _check_indices(indices: Tensor, tokens: int, dtype: torch.dtype) -> None:
    if indices.dim() != 2 or indices.shape[0] != tokens or indices.dtype != dtype or not indices.is_contiguous():
        raise AttentionInputError(
            "indices", f"expected contiguous [{tokens}, width] {dtype}, got {list(indices.shape)} {indices.dtype}"
        )
    if indices.shape[1] > LIMITS.max_width:
        raise AttentionInputError("indices", f"{indices.shape[1]} entries a row, the most is {LIMITS.max_width}")


def check_output(name: str, out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise AttentionInputError unless `out` is a contiguous tensor of that shape and type on `device`."""
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise AttentionInputError(name, f"expected contiguous {list(shape)} {dtype} on {device}")
