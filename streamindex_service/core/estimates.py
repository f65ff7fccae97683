"""What a piece of work takes, before it runs: bytes in closed form, seconds by what the device has shown.

Bytes are upper bounds that the worker keeps to: it is told the workspace and plans its tiles within that. Asking for
more than a tile can use would only keep others waiting, so the most that it can use is computed here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from streamindex_service.core.sizes import (
    GATE_BYTES,
    PAGE_KEYS,
    POSITION_BYTES,
    KeyFormat,
    align,
    answer_row_bytes,
    pages_of,
    query_row_bytes,
)

_FIRST_SECONDS_PER_FLOP = 1e-10  # before anything was measured
_LEAST_TELLING = 20  # log2 of operations, about: what takes fewer is no measure of what takes more
_WEIGHT = 0.2  # of a new measurement against those before it
_FIRST_TIMES = 3  # measurements of which the least counts
# A size that took so many times as long an operation as a smaller one is doubted with every measurement of the smaller,
# and forgotten after so many doubts; the next time after twice as many, for it may have been right.
_DOUBTFUL, _PATIENCE, _MOST_PATIENCE = 2.0, 8, 1 << 16


@dataclass(frozen=True, slots=True)
class WorkspaceTerms:
    """What the workspace of an implementation depends on, as its worker says; the fields are those of the message."""

    fixed_bytes: int = 0
    row_bytes: int = 0
    row_element_bytes: int = 0
    row_entry_bytes: int = 0
    row_key_32nds: int = 0
    row_key_head_bytes: int = 0
    key_bytes: int = 0
    key_dim_bytes: int = 0
    filter_keys: int = 0
    filter_entries: int = 0
    survivor_bytes: int = 0
    survivors: int = 0
    entry_survivors: int = 0
    marked_row_bytes: int = 0
    marked_key_32nds: int = 0

    def size_bytes(self, rows: int, keys: int, heads: int, head_dim: int, top_k: int) -> int:
        """Of a tile of so many rows and keys (a multiple of 256)."""
        row = self.row_bytes + self.row_element_bytes * heads * head_dim + self.row_entry_bytes * top_k
        row += self.row_key_head_bytes * keys * heads
        row_32nds = self.row_key_32nds * keys
        if self.filter_keys and keys >= max(self.filter_keys, self.filter_entries * top_k):
            row += self.survivor_bytes * max(self.survivors, self.entry_survivors * top_k) + self.marked_row_bytes
            row_32nds += self.marked_key_32nds * keys
        return (
            self.fixed_bytes
            + rows * (row + -(-row_32nds // 32))
            + keys * (self.key_bytes + self.key_dim_bytes * head_dim)
        )


@dataclass(frozen=True, slots=True)
class TopkWork:
    """The operation `topk` on one layer, rows apart: everything that its cost depends on."""

    key_format: KeyFormat
    heads: int
    head_dim: int
    keys: int
    top_k: int
    want_scores: bool
    terms: WorkspaceTerms

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

    def workspace_bytes(self, rows: int, keys: int) -> int:
        """The most that a tile of rows that see so many keys can use: all in one chunk and tile. More is no faster."""
        tile_keys = PAGE_KEYS * pages_of(max(1, keys))
        return self.terms.size_bytes(rows, tile_keys, self.heads, self.head_dim, self.top_k)


@dataclass(slots=True)
class _Seen:
    """What work of one size has shown: its seconds for an operation, and how often it was measured."""

    seconds_per_flop: float
    patience: int = _PATIENCE
    times: int = 1
    doubts: int = 0

    def add(self, rate: float) -> None:
        """One more measurement. A rise counts up to a doubling: a single slow tile says little."""
        self.doubts = 0
        self.times += 1
        if self.times <= _FIRST_TIMES:
            self.seconds_per_flop = min(self.seconds_per_flop, rate)
        else:
            self.seconds_per_flop += _WEIGHT * (min(rate, 2 * self.seconds_per_flop) - self.seconds_per_flop)


class DeviceSpeed:
    """Seconds of work by the operations in it.

    Small tiles are slow for their size, and say little of large ones: the time is kept for each power of two of
    operations apart, at most 64 numbers. A size between two that were seen lies between them; one beyond all is judged
    by the nearest. The first tile of a shape may have waited for its kernels to be compiled: of the first few
    measurements of a size the least counts. If it is avoided for what that one took, there are no others: so
    what took longer than smaller work since has shown to be enough is forgotten after a while, and tried again.

    Tiles of next to no work (a search of an empty layer has one operation) show what a launch takes, and are no measure
    of anything larger: by them a common search would take hours, and be refused for its deadline.
    """

    def __init__(self, copy_bytes_per_s: float = 2e9) -> None:  # less than the bus: each page is noted on its own
        self.copy_bytes_per_s = copy_bytes_per_s
        self._seen: dict[int, _Seen] = {}  # by the operations' number of bits
        self._sizes: list[int] = []  # its keys in order
        self._patience: dict[int, int] = {}  # of sizes that were forgotten

    @property
    def measured(self) -> bool:
        """True once anything was."""
        return bool(self._seen)

    def observe(self, flop: int, seconds: float) -> None:
        """Work of so many operations took so long."""
        rate, size = max(seconds, 1e-7) / flop, flop.bit_length()
        seen = self._seen.get(size)
        if seen is None:
            self._seen[size] = seen = _Seen(rate, self._patience.get(size, _PATIENCE))
            insort(self._sizes, size)
        else:
            seen.add(rate)
        if size >= _LEAST_TELLING:
            self._doubt(size, seen.seconds_per_flop)

    def _doubt(self, size: int, rate: float) -> None:
        """Work of this size took so long an operation: what is larger should not take much longer."""
        for larger in self._sizes[bisect_left(self._sizes, size + 1) :]:
            seen = self._seen[larger]
            if seen.seconds_per_flop <= _DOUBTFUL * rate:
                continue
            seen.doubts += 1
            if seen.doubts >= seen.patience:
                self._patience[larger] = min(2 * seen.patience, _MOST_PATIENCE)
                self._sizes.remove(larger)
                del self._seen[larger]

    def seconds(self, flop: int) -> float:
        """What so many operations will take, about."""
        return flop * self._rate(flop.bit_length())

    def promotion_s(self, size_bytes: int) -> float:
        """What it takes to bring so many bytes of keys to the device."""
        return size_bytes / self.copy_bytes_per_s

    def rows(self, flop_per_row: int, seconds: float, most: int) -> int:
        """The most rows, up to `most`, of a tile of about `seconds`, or of twice what any work takes; at least 1.

        Where a tile of one row takes most of the time for being a tile, less of them would only be slower.
        """
        seconds = max(seconds, 2 * self._least_s())
        if self.seconds(most * flop_per_row) <= seconds:
            return most
        low, high = 1, most
        while high - low > 1:  # as good as sorted: larger work hardly ever takes less time
            middle = (low + high) // 2
            low, high = (middle, high) if self.seconds(middle * flop_per_row) <= seconds else (low, middle)
        return low

    def _least_s(self) -> float:
        return min((seen.seconds_per_flop * 2**size for size, seen in self._seen.items()), default=0.0)

    def _rate(self, size: int) -> float:
        sizes = self._sizes
        if not sizes:
            return _FIRST_SECONDS_PER_FLOP
        place = bisect_left(sizes, size)
        above = sizes[min(place, len(sizes) - 1)]
        below = above if above <= size else sizes[max(place - 1, 0)]
        rate = self._seen[below].seconds_per_flop
        if below == above:
            return min(rate, _FIRST_SECONDS_PER_FLOP) if below < min(size, _LEAST_TELLING) else rate
        return float(rate * (self._seen[above].seconds_per_flop / rate) ** ((size - below) / (above - below)))
