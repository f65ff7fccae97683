"""What a piece of work takes, before it runs: bytes in closed form, seconds by what the device has shown.

Bytes are upper bounds that the worker keeps to: it is told the workspace and plans its tiles within that. Asking for
more than a tile can use would only keep others waiting, so the most that it can use is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamindex_service.core.sizes import (
    GATE_BYTES,
    POSITION_BYTES,
    KeyFormat,
    align,
    answer_row_bytes,
    page_bytes,
    pages_of,
    query_row_bytes,
)

_SLACK_BYTES = 2 << 20  # small tensors, and what an allocator rounds up
_FIRST_SECONDS_PER_FLOP = 1e-10  # before anything was measured
_WEIGHT = 0.2  # of a new measurement against those before it
# Bytes of workspace (a key, an entry of the answer) of one query row, by implementation: scores, marks and survivors of
# `triton`; packed keys, twice, of `chunked`. What is not listed takes the larger.
_ROW_WORKSPACE = {"triton": (5, 160)}
_ANY_ROW_WORKSPACE = (64, 64)


@dataclass(frozen=True, slots=True)
class TopkWork:
    """The operation `topk` on one layer, rows apart: everything that its cost depends on."""

    key_format: KeyFormat
    heads: int
    head_dim: int
    keys: int
    top_k: int
    want_scores: bool
    implementation: str = ""

    def flop(self, rows: int, keys: int | None = None) -> int:
        """Operations of rows that see so many keys, all by default: a product and a sum for each head and element."""
        return max(1, 2 * rows * (self.keys if keys is None else keys) * self.heads * self.head_dim)

    def staging_bytes(self, rows: int) -> int:
        """Device memory of the rows and their answers."""
        sizes = (
            query_row_bytes(self.key_format, self.heads, self.head_dim),
            self.heads * GATE_BYTES,
            POSITION_BYTES,
            answer_row_bytes(self.top_k, self.want_scores),
        )
        return sum(align(rows * size) for size in sizes)

    def workspace_bytes(self, rows: int) -> int:
        """The most that a tile of so many rows can use: all keys in one key tile. More makes nothing faster."""
        a_key, an_entry = _ROW_WORKSPACE.get(self.implementation, _ANY_ROW_WORKSPACE)
        heads = 0 if self.implementation in _ROW_WORKSPACE else 4 * self.heads
        all_keys = pages_of(max(1, self.keys))
        row = 256 * all_keys * (a_key + heads) + an_entry * self.top_k + 8 * self.heads * self.head_dim
        return rows * row + page_bytes(KeyFormat.FP32, self.head_dim) + _SLACK_BYTES


class DeviceSpeed:
    """Seconds of work by the operations in it.

    Small tiles are slow for their size, and say nothing of large ones: the time is kept for each power of two of
    operations apart, at most 64 numbers, and a size never seen is judged by the nearest that was.
    """

    def __init__(self, copy_bytes_per_s: float = 8e9) -> None:
        self.copy_bytes_per_s = copy_bytes_per_s
        self._seconds_per_flop: dict[int, float] = {}  # by floor(log2(operations))

    @property
    def measured(self) -> bool:
        """True once anything was."""
        return bool(self._seconds_per_flop)

    def observe(self, flop: int, seconds: float) -> None:
        """Work of so many operations took so long."""
        rate, bucket = max(seconds, 1e-7) / flop, flop.bit_length()
        before = self._seconds_per_flop.get(bucket, rate)
        self._seconds_per_flop[bucket] = before + _WEIGHT * (rate - before)

    def seconds(self, flop: int) -> float:
        """What so many operations will take, about."""
        return flop * self._rate(flop.bit_length())

    def promotion_s(self, size_bytes: int) -> float:
        """What it takes to bring so many bytes of keys to the device."""
        return size_bytes / self.copy_bytes_per_s

    def rows(self, flop_per_row: int, seconds: float) -> int:
        """Rows of a tile of about `seconds`; at least 1. The best speed shown says how many."""
        best = min(self._seconds_per_flop.values(), default=_FIRST_SECONDS_PER_FLOP)
        rows = max(1, int(seconds / (best * flop_per_row)))
        return max(1, min(rows, int(seconds / (self._rate((rows * flop_per_row).bit_length()) * flop_per_row))))

    def _rate(self, bucket: int) -> float:
        if not self._seconds_per_flop:
            return _FIRST_SECONDS_PER_FLOP
        nearest = min(self._seconds_per_flop, key=lambda other: (abs(other - bucket), -other))
        return self._seconds_per_flop[nearest]
