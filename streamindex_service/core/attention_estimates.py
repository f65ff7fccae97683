"""What a tile of attention takes, before it runs: bytes in closed form, and operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from streamindex_service.core.sizes import (
    BF16_BYTES,
    INDEX_BYTES,
    LSE_BYTES,
    PAGE_KEYS,
    POSITION_BYTES,
    align,
    pages_of,
)
from streamindex_service.core.specs import KvSpec

# Device memory of a tile beside rows and tensors as they are: see `AttentionWork.tile_bytes`.
_QUERY_ROW_BYTES = 80  # of each query row: its position, and where the rows of its sequence and its window are
_PART_BYTES = 512  # of each call's rows: runs of rows to be copied, and the addresses of a few pages
_PAGE_ADDRESS_BYTES = 8
# Where rows are copied:
_KEPT_ENTRY_BYTES = 4  # of each entry of an index row: its place among the copies
_WIDE_ENTRY_BYTES = 25  # and while that is looked for
_CHOSEN_ENTRY_BYTES, _CHOSEN_ROW_BYTES = 13, 25  # of each entry and each copied row, while the latter are listed
_PART_ELEMENT_BYTES = 4  # of the output of a part of an index row
# How index rows are split over programs: so that a tile is about so many of these, as a device has multiprocessors; in
# so many parts at most, each of so many (entry, head) pairs at least, for what they give is written and read again. A
# program takes between 16 and 64 heads. A decode step is taken to have so many rows.
_PROGRAMS, MOST_PARTS, _PART_PAIRS = 128, 4, 8192
_LEAST_PART_HEADS, _MOST_PART_HEADS = 16, 64
STEP_ROWS = 32
# Window pages come in groups of so many, so that a stream of queries does not change its pages with every tile.
WINDOW_GROUP = 4


@dataclass(frozen=True, slots=True)
class AttentionTerms:
    """The least workspace for one query row, and what a tile takes beside it, as the worker says; the fields are those
    of the message. An implementation without terms of heads or entries takes `fixed_bytes` for any number of rows;
    others take what they are given, for as many rows at a time."""

    least_bytes: int = 0
    fixed_bytes: int = 0
    head_bytes: int = 0
    head_dim_bytes: int = 0
    entry_bytes: int = 0
    entry_head_bytes: int = 0
    entry_dim_bytes: int = 0
    copied_row_bytes: int = 0
    index_entry_bytes: int = 0
    reads_pages: bool = False
    splits: bool = False

    def size_bytes(self, heads: int, key_dim: int, entries: int, parts: int = 1) -> int:
        """Of rows with so many entries, in so many parts, computed one at a time."""
        return max(self.least_bytes, self.used_bytes(heads, key_dim, entries, 1, parts))

    def used_bytes(self, heads: int, key_dim: int, entries: int, rows: int, parts: int = 1) -> int:
        """What so many rows take if they are computed together, for which there may be no room."""
        head = self.head_bytes + self.head_dim_bytes * key_dim
        entry = self.entry_bytes + self.entry_head_bytes * heads + self.entry_dim_bytes * key_dim
        if parts > 1:  # an output of each in float32, no longer than a key, and its lse
            head += parts * _PART_ELEMENT_BYTES * (key_dim + 1)
        return self.fixed_bytes + rows * (heads * head + entries * entry)


def parts_of(kv: KvSpec, entries: int | None, tile_rows: int) -> int:
    """How many parts each index row is split into. entries: of a row, None where each query attends all that it sees;
    tile_rows: query rows of a usual tile. Nothing here is of a single tile: a row's answer has the same bits in any."""
    items = max(1, tile_rows) * -(-kv.heads // _MOST_PART_HEADS)
    parts = min(MOST_PARTS, _PROGRAMS // items)
    if entries is not None:
        parts = min(parts, entries * min(_MOST_PART_HEADS, max(_LEAST_PART_HEADS, kv.heads)) // _PART_PAIRS)
    return max(1, parts)


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """Attention on one layer, query rows apart: everything that its cost depends on.

    width: indices of a query row; window: tokens of a window; kv_rows: of the layer. named: the indices come with the
    query rows; else there are none, and `width` is how many rows a query may see. parts: see `parts_of`.
    """

    kv: KvSpec
    kv_rows: int
    width: int
    window: int
    want_lse: bool
    terms: AttentionTerms
    named: bool = True
    parts: int = 1

    def flop(self, rows: int) -> int:
        """Operations of query rows that attend all they may: two products of a product and a sum each."""
        return self.flop_of_entries(rows * min(self.width, self.kv_rows), rows)

    def flop_of_entries(self, entries: int, rows: int) -> int:
        """Operations of query rows that attend so many KV rows together, and their windows."""
        attended = entries + rows * self.window
        return max(1, 2 * attended * self.kv.heads * (self.kv.key_dim + self.kv.value_dim))

    def staging_bytes(self, rows: int) -> int:
        """Device memory of the query rows and their answers."""
        heads = self.kv.heads
        indices_bytes = self.width * INDEX_BYTES * self.named
        sizes = (heads * self.kv.key_dim * BF16_BYTES, POSITION_BYTES, indices_bytes, self._answer_bytes)
        return sum(align(rows * size) for size in sizes)

    def tile_bytes(self, rows: int, span: int) -> int:
        """Device memory of so many query rows whose windows cover `span` tokens together, and of their answers.

        Unless the kernels read rows in their pages, also of the rows that are attended, which are copied behind each
        other: each compressed row once, where not fewer are named. Then it is the most of what is there at a time: the
        places of the copies are looked for, the rows to be copied are listed, they are copied, they are attended. Only
        the last has answers.
        """
        # where rows are copied, indices are made that the query rows do not bring
        indices_bytes = self.width * INDEX_BYTES * (self.named or not self.terms.reads_pages)
        asked = rows * (self.kv.heads * self.kv.key_dim * BF16_BYTES + indices_bytes + _QUERY_ROW_BYTES)
        asked += _PAGE_ADDRESS_BYTES * pages_of(self.kv_rows + span) + _PART_BYTES
        attended = rows * ((self.width + self.window) * self.terms.index_entry_bytes + self._answer_bytes)
        if self.terms.reads_pages:
            return asked + attended
        entries = rows * self.width
        named = min(entries, self.kv_rows)
        copied = named + span
        form = self.kv.form
        copies = copied * (form.row_bytes + form.scale_bytes) + _KEPT_ENTRY_BYTES * entries
        most = max(
            _WIDE_ENTRY_BYTES * entries,
            _CHOSEN_ENTRY_BYTES * entries + _CHOSEN_ROW_BYTES * copied,
            copies + self.terms.copied_row_bytes * copied,
            copies + attended,
        )
        return asked + most

    @property
    def _answer_bytes(self) -> int:
        """Of a query row."""
        return self.kv.heads * (self.kv.value_dim * BF16_BYTES + LSE_BYTES * self.want_lse)

    def workspace_bytes(self) -> int:
        """The least workspace of the attention itself. It takes one query row, and more of them one after the other."""
        entries = self.width + self.window
        return self.terms.size_bytes(self.kv.heads, self.kv.key_dim, entries, self.parts)

    def used_bytes(self, rows: int, workspace_bytes: int) -> int:
        """What of a workspace so many query rows make use of."""
        entries = self.width + self.window
        used_bytes = self.terms.used_bytes(self.kv.heads, self.kv.key_dim, entries, rows, self.parts)
        return min(workspace_bytes, used_bytes)

    def window_bytes(self, rows: int) -> int:
        """The most bytes of window pages that so many query rows need whose positions lie as close together."""
        if not self.window:
            return 0
        pages = pages_of(rows + self.window) + 2 * WINDOW_GROUP
        return pages * self.kv.form.page_bytes

    def rows_within(self, size_bytes: int, most: int) -> int:
        """The most query rows of a tile, up to `most`, for which all but KV pages and workspace takes no more than so
        many bytes; 0 when not even one row's does."""
        if self.beside_bytes(most) <= size_bytes:  # as nearly always
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.beside_bytes(middle) <= size_bytes else (low, middle)
        return low

    def beside_bytes(self, rows: int) -> int:
        """Of so many query rows, all that a tile takes beside the KV pages and the workspace."""
        span = rows + self.window if self.window else 0
        return self.tile_bytes(rows, span) + self.window_bytes(rows)


@dataclass(frozen=True, slots=True)
class Padding:
    """How much wider the index rows of a tile are than each by itself: all of them are as wide as the widest."""

    rows: int = 0
    widest: int = 0
    own_entries: int = 0

    @classmethod
    def of(cls, parts: Iterable[tuple[int, int]]) -> Padding:
        """Of (rows, width) of each part."""
        found = cls()
        for rows, width in parts:
            found = found.plus(rows, width)
        return found

    def plus(self, rows: int, width: int) -> Padding:
        """With so many rows more."""
        return Padding(self.rows + rows, max(self.widest, width), self.own_entries + rows * width)

    @property
    def entries(self) -> int:
        """Of all rows, beyond their own."""
        return self.rows * self.widest - self.own_entries


def window_group(first_token: int, stop_token: int, pages: int) -> tuple[int, int]:
    """Pages [first, stop), of so many, that hold these tokens, in whole groups."""
    group = WINDOW_GROUP * PAGE_KEYS
    return min(pages, first_token // group * WINDOW_GROUP), min(pages, -(-stop_token // group) * WINDOW_GROUP)
