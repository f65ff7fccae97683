"""Keys and queries of small integers, and the answer that a search must give.

Small integers are exact in every format, and so are their scores in float32: an answer is right or wrong, there is no
tolerance. Rows come from a pool that is walked round and round, so that a cache's keys are known by where the walk
began: nothing is drawn while the load runs, and nothing of what was sent is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

_KEY_ROWS = 65_537  # a prime: chunks of two's powers never begin at the same row twice
_QUERY_ROWS = 2_053

Array = npt.NDArray[np.generic]
_Element = TypeVar("_Element", bound=np.generic)


class WrongAnswerError(Exception):
    """A search gave other indices than the reference."""


@dataclass
class KeyRun:
    """The keys of a layer: `length` rows of the walk from row `offset` on."""

    offset: int
    length: int = 0


class Tensors:
    """The pool for one shape. Everything in it is read-only, and shared by all users of a process."""

    def __init__(self, heads: int, head_dim: int, key_format: str, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.keys = random.integers(-2, 3, (_KEY_ROWS, head_dim), np.int8)
        self.q = random.integers(-2, 3, (_QUERY_ROWS, heads, head_dim), np.int8)
        self.w = random.integers(-3, 4, (_QUERY_ROWS, heads)).astype(np.float32)
        self._encoded_keys = encode(self.keys, key_format)
        self._encoded_q = encode(self.q, key_format)

    def key_rows(self, run: KeyRun, count: int) -> Array:
        """The next `count` rows of a run: [count, head_dim] in the format."""
        return _walk(self._encoded_keys, run.offset + run.length, count)

    def query_rows(self, first: int, count: int) -> tuple[Array, npt.NDArray[np.float32]]:
        """Rows from `first` on: q [count, heads, head_dim] in the format, w [count, heads] float32."""
        return _walk(self._encoded_q, first, count), _walk(self.w, first, count)

    def expected(self, run: KeyRun, ratio: int, query: int, position: int, top_k: int) -> npt.NDArray[np.int32]:
        """The answer to query row `query` at `position`: indices [top_k], best first, -1 pads."""
        visible = min((position + 1) // ratio, run.length)
        k = _walk(self.keys, run.offset, visible).astype(np.float32)
        row = query % _QUERY_ROWS
        scores = np.maximum(k @ self.q[row].astype(np.float32).T, 0) @ self.w[row]
        best = np.argsort(-scores, kind="stable")[:top_k]  # stable: of equal scores the lower index comes first
        return np.pad(best, (0, top_k - len(best)), constant_values=-1).astype(np.int32)

    def check(self, indices: Array, run: KeyRun, ratio: int, queries: tuple[int, int], position: int, row: int) -> None:
        """Compare row `row` of an answer [rows, top_k] to `queries`, first and count, the first being at `position`.

        Raises WrongAnswerError.
        """
        first, count = queries
        if indices.ndim != 2 or len(indices) != count:
            raise WrongAnswerError(f"{count} rows were asked for, the answer is {indices.shape}")
        right = self.expected(run, ratio, first + row, position + row, indices.shape[1])
        wrong = int(np.count_nonzero(indices[row] != right))
        if wrong:
            raise WrongAnswerError(f"{wrong} of {len(right)} indices of a row are wrong")


def encode(values: npt.NDArray[np.int8], key_format: str) -> Array:
    """Small integers in a format; bf16 as its bits."""
    if key_format == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"fp16": np.float16, "fp32": np.float32}[key_format])


def _walk(pool: npt.NDArray[_Element], first: int, count: int) -> npt.NDArray[_Element]:
    return pool.take(np.arange(first, first + count), 0, mode="wrap")


@cache
def shared_tensors(heads: int, head_dim: int, key_format: str, seed: int) -> Tensors:
    """The pool of this process for a shape."""
    return Tensors(heads, head_dim, key_format, seed)
