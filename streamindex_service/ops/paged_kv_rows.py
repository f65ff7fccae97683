"""KV rows in pages of 256, wherever the pages lie, as a cache holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from streamindex_service.ops.extent_pages import ExtentPages, addresses_of, to_device
from streamindex_service.ops.kv_rows import KvFormat
from streamindex_service.ops.paged_keys import PAGE_KEYS

# A place names a row wherever its page lies: units of bytes from an anchor to the page, and the row in it.
PLACE_BITS = 8  # of the row
PLACE_UNIT_BYTES = 16
assert PAGE_KEYS == 1 << PLACE_BITS
_ANY_PLACE = 1 << 62


def row_sizes(kv_format: KvFormat, key_dim: int) -> tuple[int, int]:
    """Bytes of a row, and of the scales that lie beside it. Raises ValueError for another key_dim than the format's."""
    packing = kv_format.packed
    if packing is None:
        return 2 * key_dim, 0
    if key_dim != packing.key_dim:
        raise ValueError(f"key_dim: rows of {kv_format.value} have {packing.key_dim} elements, got {key_dim}")
    return packing.row_bytes, packing.scale_bytes


@dataclass(frozen=True)
class PagedKvRows:
    """Rows of one shared KV head in pages; pages may lie in several device allocations.

    length: rows that hold something; those behind them are never read.
    pages: ceil(length / 256) tensors [page_bytes] uint8 on one device, aligned to 16 bytes: 256 rows, then, for a
    format with scales beside the rows, the scales of these 256; a tuple or `ExtentPages`.

    Raises ValueError if the parts disagree.
    """

    format: KvFormat
    key_dim: int
    length: int
    pages: Sequence[Tensor]

    def __post_init__(self) -> None:
        expected = -(-self.length // PAGE_KEYS)
        if self.length < 0 or len(self.pages) != expected:
            raise ValueError(f"pages: {self.length} rows need {expected} pages of {PAGE_KEYS}, got {len(self.pages)}")
        size = self.page_bytes
        if isinstance(self.pages, ExtentPages):  # all alike
            if (self.pages.page_shape, self.pages.dtype) != ((size,), torch.uint8):
                raise ValueError(
                    f"pages: expected [{size}] uint8, got {list(self.pages.page_shape)} {self.pages.dtype}"
                )
            return
        for number, page in enumerate(self.pages):
            if page.shape != (size,) or page.dtype != torch.uint8 or not page.is_contiguous():
                raise ValueError(f"pages[{number}]: expected contiguous [{size}] uint8, got {list(page.shape)}")

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row, without the scales beside it."""
        return row_sizes(self.format, self.key_dim)[0]

    @cached_property
    def scale_bytes(self) -> int:
        """Bytes of a row's scales that lie beside it; 0 for most formats."""
        return row_sizes(self.format, self.key_dim)[1]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, its scales among them."""
        return PAGE_KEYS * (self.row_bytes + self.scale_bytes)

    @cached_property
    def data(self) -> tuple[Tensor, ...]:
        """[256, row_bytes] uint8 of each page."""
        end = PAGE_KEYS * self.row_bytes
        return tuple(page[:end].view(PAGE_KEYS, self.row_bytes) for page in self.pages)

    @cached_property
    def scales(self) -> tuple[Tensor, ...]:
        """[256, scale_bytes] uint8 of each page, for a format that has them beside the rows."""
        start = PAGE_KEYS * self.row_bytes
        return tuple(page[start:].view(PAGE_KEYS, self.scale_bytes) for page in self.pages)

    @cached_property
    def addresses(self) -> npt.NDArray[np.int64]:
        """[pages] int64, of each page."""
        return addresses_of(self.pages)


@dataclass(frozen=True)
class JoinedKvRows:
    """Rows of several sequences of pages, all of one format on one device, under one numbering: row r of a part is row
    256 · (pages of the parts before it) + r. What lies between the last row of a part and the next part is nobody's."""

    parts: tuple[PagedKvRows, ...]

    def first_rows(self) -> list[int]:
        """The number that row 0 of each part has."""
        first, found = 0, []
        for part in self.parts:
            found.append(first)
            first += PAGE_KEYS * len(part.pages)
        return found

    @property
    def row_bytes(self) -> int:
        """See PagedKvRows."""
        return self.parts[0].row_bytes

    @property
    def scale_bytes(self) -> int:
        """See PagedKvRows."""
        return self.parts[0].scale_bytes

    @cached_property
    def length(self) -> int:
        """Rows that can be named."""
        return PAGE_KEYS * sum(len(part.pages) for part in self.parts)

    @cached_property
    def data(self) -> tuple[Tensor, ...]:
        """See PagedKvRows; of all parts."""
        return tuple(chain.from_iterable(part.data for part in self.parts))

    @cached_property
    def scales(self) -> tuple[Tensor, ...]:
        """See PagedKvRows; of all parts."""
        return tuple(chain.from_iterable(part.scales for part in self.parts))

    @cached_property
    def addresses(self) -> npt.NDArray[np.int64]:
        """[pages] int64, of each page of all parts."""
        return np.concatenate([part.addresses for part in self.parts])

    def placed(self, device: torch.device) -> PlacedKvRows:
        """The rows, for an operation that takes places; device: of the pages, if there are any."""
        if not len(self.addresses):
            return PlacedKvRows(self, torch.empty(0, dtype=torch.uint8, device=device))
        lowest, parts = int(self.addresses.argmin()), iter(self.parts)
        part = next(parts)
        while lowest >= len(part.pages):
            lowest -= len(part.pages)
            part = next(parts)
        return PlacedKvRows(self, part.pages[lowest])

    def unit_table(self, device: torch.device) -> Tensor:
        """Where pages lie, for kernels: [pages] int64, in units of 16 bytes from the one with the lowest address.
        Raises ValueError for a page that is not aligned to these."""
        addresses = self.addresses
        if (addresses % PLACE_UNIT_BYTES).any():
            raise ValueError(f"pages: not all of their addresses are multiples of {PLACE_UNIT_BYTES} bytes")
        return to_device((addresses - addresses.min(initial=_ANY_PLACE)) // PLACE_UNIT_BYTES, device)


@dataclass(frozen=True)
class PlacedKvRows:
    """Rows of one shared KV head in pages that lie anywhere on a device. What names one is no number but a place:

    place = units << 8 | row: the page begins so many times 16 bytes behind the anchor, the row is one of its 256.

    Negative places name nothing; which others name a row only those who make them know. pages: all that places may be
    in, kept alive by this. anchor: [page_bytes] uint8, the page with the lowest address; empty where there is none.
    """

    pages: JoinedKvRows
    anchor: Tensor

    @property
    def format(self) -> KvFormat:
        """Of all rows."""
        return self.pages.parts[0].format

    @property
    def key_dim(self) -> int:
        """Elements of a key."""
        return self.pages.parts[0].key_dim

    @property
    def data(self) -> Tensor:
        """Rows of the anchor: [256 · key_dim] bf16 or, of a packed format, [256 · row_bytes] uint8."""
        rows = self.anchor[: PAGE_KEYS * self.pages.row_bytes]
        return rows.view(torch.bfloat16) if self.format.packed is None else rows

    @property
    def scales(self) -> Tensor | None:
        """Scales of the anchor, for a format that has them beside the rows: [2048] uint8, else None."""
        return self.anchor[PAGE_KEYS * self.pages.row_bytes :] if self.pages.scale_bytes else None

    @property
    def rows(self) -> int:
        """A number that no place reaches."""
        return _ANY_PLACE
