"""Keys in pages of a fixed number of rows, wherever the pages lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from streamindex_service.ops.extent_pages import ExtentPages, addresses_of, to_device
from streamindex_service.ops.formats import KeyFormat

PAGE_KEYS = 256
SCALE_BYTES = 4  # of a key, for a format with scales
# Kernels read pages with wide loads; they are told that every offset is a multiple of this many elements.
OFFSET_ALIGNMENT_ELEMENTS = 16


@dataclass(frozen=True)
class PageTable:
    """Where pages lie: one typed base address, and each page's distance from it in elements.

    anchor: the first page, whose address is the base; offsets: [pages] int64 on the pages' device.
    """

    anchor: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class PagedKeys:
    """One layer's keys as pages of 256; pages may lie in several device allocations ("extents").

    length: valid keys. Rows past it hold anything, NaN too, and never influence a result.
    pages: ceil(length / 256) tensors [256, head_dim], contiguous, of the format's element type, on one device; a tuple
    or `ExtentPages`.
    scale_pages: as many tensors [256] float32 for a format with scales, else None.

    Raises ValueError if the parts disagree.
    """

    format: KeyFormat
    head_dim: int
    length: int
    pages: Sequence[Tensor]
    scale_pages: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        expected = -(-self.length // PAGE_KEYS)
        if self.length < 0 or len(self.pages) != expected:
            raise ValueError(f"pages: {self.length} keys need {expected} pages of {PAGE_KEYS}, got {len(self.pages)}")
        _check_pages("pages", self.pages, (PAGE_KEYS, self.head_dim), self.format.torch_dtype)
        if (self.scale_pages is not None) != self.format.has_scales:
            raise ValueError(
                f"scale_pages: format {self.format.value} takes {'one per page' if self.format.has_scales else 'none'}"
            )
        if self.scale_pages is not None:
            if len(self.scale_pages) != expected:
                raise ValueError(f"scale_pages: {expected} pages need as many, got {len(self.scale_pages)}")
            _check_pages("scale_pages", self.scale_pages, (PAGE_KEYS,), torch.float32)
            if expected and self.scale_pages[0].device != self.pages[0].device:
                raise ValueError("scale_pages: not on the device of pages")

    @classmethod
    def from_contiguous(cls, k: Tensor, scales: Tensor | None = None) -> "PagedKeys":
        """Pages over `k` [keys, head_dim], without a copy but for the ragged last page, which is padded.

        scales: [keys] float32 for e4m3 keys. The result shares `k`'s memory.
        Raises ValueError for another rank, element type or scale count.
        """
        if k.dim() != 2:
            raise ValueError(f"k: expected [keys, head_dim], got {tuple(k.shape)}")
        key_format = KeyFormat.from_torch_dtype(k.dtype)
        if scales is not None and (scales.shape != k.shape[:1] or scales.dtype != torch.float32):
            raise ValueError(f"scales: expected [{k.shape[0]}] float32, got {tuple(scales.shape)} {scales.dtype}")
        scale_pages = None if scales is None else _split(scales)
        return cls(key_format, k.shape[1], k.shape[0], _split(k), scale_pages)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, its scales among them."""
        return PAGE_KEYS * (self.head_dim * self.format.element_bytes + SCALE_BYTES * self.format.has_scales)

    @property
    def device(self) -> torch.device:
        """The device of the pages; the CPU if there is none."""
        return self.pages[0].device if self.pages else torch.device("cpu")

    @cached_property
    def key_table(self) -> PageTable:
        """Addresses of the key pages, for kernels. Raises ValueError if a page is not aligned to 16 elements."""
        return _page_table("pages", self.pages)

    @cached_property
    def scale_table(self) -> PageTable | None:
        """Addresses of the scale pages, for kernels; None for a format without scales."""
        return None if self.scale_pages is None else _page_table("scale_pages", self.scale_pages)

    @cached_property
    def table_addresses(self) -> tuple[int, int, int, int]:
        """Where what kernels read begins: the first key page, the offsets of key pages, and the same of scale pages,
        which are those of keys again for a format without scales. Raises ValueError as `key_table`."""
        key_table, scale_table = self.key_table, self.scale_table
        offsets = key_table.offsets.data_ptr()
        if scale_table is None:
            return key_table.anchor.data_ptr(), offsets, offsets, offsets
        return key_table.anchor.data_ptr(), offsets, scale_table.anchor.data_ptr(), scale_table.offsets.data_ptr()

    def gather(self, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Keys `start` to `stop` as one tensor [stop - start, head_dim] of `dtype`, and their scales [stop - start]
        float32.

        Only valid rows may be asked for. Raises ValueError otherwise.
        """
        if not 0 <= start < stop <= self.length:
            raise ValueError(f"rows {start} to {stop} are not among the {self.length} valid keys")
        first, last = start // PAGE_KEYS, -(-stop // PAGE_KEYS)
        inside = slice(start - first * PAGE_KEYS, stop - first * PAGE_KEYS)
        k = torch.cat([page.to(dtype) for page in self.pages[first:last]])[inside]
        scales = None if self.scale_pages is None else torch.cat(tuple(self.scale_pages[first:last]))[inside]
        return k, scales


def _check_pages(name: str, pages: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if isinstance(pages, ExtentPages):  # all alike
        if (pages.page_shape, pages.dtype) != (shape, dtype):
            raise ValueError(f"{name}: expected {list(shape)} {dtype}, got {list(pages.page_shape)} {pages.dtype}")
        return
    for number, page in enumerate(pages):
        if tuple(page.shape) != shape or page.dtype != dtype or not page.is_contiguous():
            raise ValueError(
                f"{name}[{number}]: expected contiguous {list(shape)} {dtype}, got {list(page.shape)} {page.dtype}"
            )
        if page.device != pages[0].device:
            raise ValueError(f"{name}[{number}]: on {page.device}, but {name}[0] on {pages[0].device}")


def _split(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of whole pages, and a padded copy of the ragged tail."""
    source = tensor.contiguous()
    if source.data_ptr() % (OFFSET_ALIGNMENT_ELEMENTS * source.element_size()):
        source = source.clone()
    whole = source.shape[0] // PAGE_KEYS
    pages = [source[number * PAGE_KEYS : (number + 1) * PAGE_KEYS] for number in range(whole)]
    if tail := source.shape[0] - whole * PAGE_KEYS:
        padded = torch.zeros((PAGE_KEYS, *source.shape[1:]), dtype=source.dtype, device=source.device)
        padded[:tail].copy_(source[whole * PAGE_KEYS :])
        pages.append(padded)
    return tuple(pages)


def _page_table(name: str, pages: Sequence[Tensor]) -> PageTable:
    if not pages:
        raise ValueError(f"{name}: an empty key set has no page table")
    anchor = pages[0]
    step = OFFSET_ALIGNMENT_ELEMENTS * anchor.element_size()
    addresses = addresses_of(pages)
    distances = addresses - addresses[0]
    if addresses[0] % 16 or (distances % step).any():
        number = int((distances % step != 0).argmax())
        raise ValueError(f"{name}[{number}]: not aligned to {step} bytes from the first page")
    return PageTable(anchor, to_device(distances // anchor.element_size(), anchor.device))
