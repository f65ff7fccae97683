"""One checked top-k problem, as every implementation receives it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamindex_service.ops.formats import KeyFormat
from streamindex_service.ops.paged_keys import PagedKeys
from streamindex_service.ops.topk.order import Order


@dataclass(frozen=True)
class Limits:
    """The sizes that the operation takes."""

    min_heads: int = 1
    max_heads: int = 128
    min_head_dim: int = 16
    max_head_dim: int = 256
    head_dim_multiple: int = 16
    min_top_k: int = 1
    max_top_k: int = 4096
    min_ratio: int = 1
    max_ratio: int = 2**31 - 1
    max_keys: int = 2**31 - 1
    max_position: int = 2**62


LIMITS = Limits()


class TopkInputError(ValueError):
    """An argument the operation cannot take; `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class Problem:
    """Checked inputs and the places for the outputs.

    q: [rows, heads, head_dim] contiguous; w: [rows, heads] float32 contiguous.
    positions: the first row's position, or one per row ([rows] int64 on the CPU).
    out_indices: [rows, top_k] int32; out_scores: [rows, top_k] float32 or None; both contiguous.
    """

    q: Tensor
    w: Tensor
    keys: PagedKeys
    positions: int | Tensor
    ratio: int
    top_k: int
    order: Order
    out_indices: Tensor
    out_scores: Tensor | None

    @property
    def rows(self) -> int:
        """Query rows."""
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        """Indexer heads."""
        return self.q.shape[1]

    @property
    def head_dim(self) -> int:
        """Elements of one head's query, and of a key."""
        return self.q.shape[2]

    @property
    def format(self) -> KeyFormat:
        """Format of keys and queries."""
        return self.keys.format

    def visible(self, start: int, stop: int) -> Tensor:
        """Keys that rows `start` to `stop` may see: [stop - start] int64 on the CPU."""
        return visible_keys(self.positions, start, stop, self.ratio, self.keys.length)

    def max_visible(self, start: int, stop: int) -> int:
        """The largest of `visible(start, stop)`, without a tensor where positions are consecutive."""
        last = self.positions + stop - 1 if isinstance(self.positions, int) else int(self.positions[start:stop].max())
        return min((last + 1) // self.ratio, self.keys.length)


def visible_keys(positions: int | Tensor, start: int, stop: int, ratio: int, length: int) -> Tensor:
    """min((position + 1) // ratio, length) of rows `start` to `stop`: [stop - start] int64 on the CPU."""
    if isinstance(positions, int):
        p = torch.arange(positions + start, positions + stop, dtype=torch.int64)
    else:
        p = positions[start:stop].to("cpu", torch.int64)
    return ((p + 1) // ratio).clamp_(max=length)


def first_if_consecutive(positions: Tensor) -> int | Tensor:
    """Positions [rows] int64 on the CPU; those that go up by one are given by the first: then no row has to look its
    own up."""
    if not len(positions):
        return positions
    # The device waits for this, and numpy's loops do not wake a pool of threads first.
    numbers = positions.numpy()
    first, rows = int(numbers[0]), len(numbers)
    if int(numbers[-1]) - first != rows - 1 or not np.array_equal(numbers - first, np.arange(rows)):
        return positions
    return first


def check_inputs(
    q: Tensor, w: Tensor, keys: PagedKeys, positions: int | Tensor, ratio: int, top_k: int
) -> int | Tensor:
    """Raise TopkInputError for the first argument that disagrees with another one or with LIMITS.

    Gives the positions, those that go up by one by the first of them.
    """
    if q.dim() != 3 or not q.is_contiguous():
        raise TopkInputError("q", f"expected contiguous [rows, heads, head_dim], got {list(q.shape)}")
    rows, heads, head_dim = q.shape
    if q.dtype != keys.format.torch_dtype:
        raise TopkInputError("q", f"expected {keys.format.torch_dtype} like the keys, got {q.dtype}")
    if not LIMITS.min_heads <= heads <= LIMITS.max_heads:
        raise TopkInputError("q", f"{heads} heads, limits are {LIMITS.min_heads} to {LIMITS.max_heads}")
    if head_dim != keys.head_dim:
        raise TopkInputError("q", f"head_dim {head_dim}, keys have {keys.head_dim}")
    if not LIMITS.min_head_dim <= head_dim <= LIMITS.max_head_dim or head_dim % LIMITS.head_dim_multiple:
        raise TopkInputError("q", f"head_dim {head_dim}, limits are multiples of 16 from 16 to 256")
    if tuple(w.shape) != (rows, heads) or w.dtype != torch.float32 or not w.is_contiguous():
        raise TopkInputError("w", f"expected contiguous [{rows}, {heads}] float32, got {list(w.shape)} {w.dtype}")
    if w.device != q.device or (keys.length and keys.device != q.device):
        raise TopkInputError("w" if w.device != q.device else "keys", f"not on {q.device}, where q is")
    if not LIMITS.min_ratio <= ratio <= LIMITS.max_ratio:
        raise TopkInputError("ratio", f"{ratio}, limits are {LIMITS.min_ratio} to {LIMITS.max_ratio}")
    if not LIMITS.min_top_k <= top_k <= LIMITS.max_top_k:
        raise TopkInputError("top_k", f"{top_k}, limits are {LIMITS.min_top_k} to {LIMITS.max_top_k}")
    if keys.length > LIMITS.max_keys:
        raise TopkInputError("keys", f"{keys.length} keys, the most is {LIMITS.max_keys}")
    return _checked_positions(positions, rows)


def _checked_positions(positions: int | Tensor, rows: int) -> int | Tensor:
    if not isinstance(positions, int):
        if tuple(positions.shape) != (rows,) or positions.dtype != torch.int64:
            raise TopkInputError("positions", f"expected [{rows}] int64, got {list(positions.shape)} {positions.dtype}")
        positions = first_if_consecutive(positions)
    if isinstance(positions, int):
        if not 0 <= positions <= LIMITS.max_position - max(1, rows) + 1:
            raise TopkInputError("positions", f"{positions}, limits are 0 to 2^62 for the last row")
    elif rows and not 0 <= int(positions.min()) <= int(positions.max()) <= LIMITS.max_position:
        raise TopkInputError("positions", "limits are 0 to 2^62")
    return positions


def check_output(name: str, out: Tensor, rows: int, top_k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise TopkInputError unless `out` is a contiguous [rows, top_k] tensor of `dtype` on `device`."""
    fits = tuple(out.shape) == (rows, top_k) and out.dtype == dtype and out.device == device and out.is_contiguous()
    if not fits:
        raise TopkInputError(name, f"expected contiguous [{rows}, {top_k}] {dtype} on {device}")
