"""One checked assembly of index rows, as every implementation receives it."""

from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_ROWS = 2**31 - 1  # that int32 can name


class IndexRowsInputError(ValueError):
    """An argument the operation cannot take; `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class Problem:
    """Checked inputs and the place for the output; see `assemble_index_rows`."""

    found: Tensor
    positions: int | Tensor
    window: int
    window_row: int | Tensor
    compressed_row: int
    out: Tensor

    @property
    def tokens(self) -> int:
        """Query tokens."""
        return self.found.shape[0]

    @property
    def top_k(self) -> int:
        """Entries of a search's result."""
        return self.found.shape[1]


def check_problem(problem: Problem) -> None:
    """Raise IndexRowsInputError for the first argument that disagrees with another one."""
    p = problem
    if p.found.dim() != 2 or p.found.dtype != torch.int32 or not p.found.is_contiguous():
        raise IndexRowsInputError(
            "found", f"expected contiguous [tokens, top_k] int32, got {list(p.found.shape)} {p.found.dtype}"
        )
    if p.window < 0:
        raise IndexRowsInputError("window", f"{p.window}, expected 0 or more")
    for name, value in (("positions", p.positions), ("window_row", p.window_row)):
        if isinstance(value, Tensor) and (
            tuple(value.shape) != (p.tokens,)
            or value.dtype != torch.int64
            or not value.is_contiguous()
            or value.device != p.found.device
        ):
            raise IndexRowsInputError(name, f"expected an int, or contiguous [{p.tokens}] int64 beside `found`")
    if isinstance(p.positions, int):
        first_row = p.window_row if isinstance(p.window_row, int) else 0
        if p.positions < 0 or p.positions + p.tokens + first_row > _MOST_ROWS:
            raise IndexRowsInputError("positions", f"{p.positions}: below 0, or of rows beyond {_MOST_ROWS}")
    if not 0 <= p.compressed_row <= _MOST_ROWS:
        raise IndexRowsInputError("compressed_row", f"{p.compressed_row}, expected 0 to {_MOST_ROWS}")
    shape = (p.tokens, p.window + p.top_k)
    if (
        tuple(p.out.shape) != shape
        or p.out.dtype != torch.int32
        or p.out.device != p.found.device
        or not p.out.is_contiguous()
    ):
        raise IndexRowsInputError("out", f"expected contiguous {list(shape)} int32 on {p.found.device}")
