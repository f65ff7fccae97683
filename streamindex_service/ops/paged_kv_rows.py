"""KV rows in pages of 256, wherever the pages lie, as a cache holds them."""

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

_WORD_BYTES = 4  # rows are copied in words; the bytes of every format are a multiple of them


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
    def anchor(self) -> Tensor:
        """The first page."""
        return self.pages[0]

    @cached_property
    def addresses(self) -> npt.NDArray[np.int64]:
        """[pages] int64, of each page."""
        return addresses_of(self.pages)

    @cached_property
    def word_table(self) -> Tensor:
        """See JoinedKvRows."""
        return JoinedKvRows((self,)).word_table


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
    def anchor(self) -> Tensor:
        """The first page of all."""
        return next(part.anchor for part in self.parts if part.length)

    @cached_property
    def data(self) -> tuple[Tensor, ...]:
        """See PagedKvRows; of all parts."""
        return tuple(chain.from_iterable(part.data for part in self.parts))

    @cached_property
    def scales(self) -> tuple[Tensor, ...]:
        """See PagedKvRows; of all parts."""
        return tuple(chain.from_iterable(part.scales for part in self.parts))

    @cached_property
    def word_table(self) -> Tensor:
        """Where pages lie, for kernels: [pages] int64 on their device, in words of 4 bytes from the first page."""
        addresses = np.concatenate([part.addresses for part in self.parts])
        return to_device((addresses - addresses[0]) // _WORD_BYTES, self.anchor.device)
