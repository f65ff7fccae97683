"""Pages that lie in device allocations, described by numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class ExtentPages(Sequence[Tensor]):
    """Pages of one shape and type within allocations ("extents"), as a sequence of tensors.

    A tensor object costs the host about as much as copying a page does the device, and a layer has thousands of pages.
    So there is none before somebody asks for it, and kernels, which take addresses, never do.

    extents: [bytes] uint8 each, contiguous, on one device; kept alive.
    which, starts: [pages] int64, the extent of each page and the byte in it where the page begins.
    page_shape, dtype: of each page.

    Raises ValueError for a page that is not within its extent or not aligned to its element type.
    """

    def __init__(
        self,
        extents: Sequence[Tensor],
        which: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        page_shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.page_shape = page_shape
        self.dtype = dtype
        self._extents = extents
        self._which = which
        self._starts = starts
        self._page_bytes = dtype.itemsize
        for size in page_shape:
            self._page_bytes *= size
        if len(which):
            sizes = np.array([extent.numel() for extent in extents], dtype=np.int64)
            if (
                (starts < 0).any()
                or (starts + self._page_bytes > sizes[which]).any()
                or (starts % dtype.itemsize).any()
            ):
                raise ValueError("pages: not all of them are within their extents and aligned")

    def __len__(self) -> int:
        return len(self._which)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...

    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        start = int(self._starts[index])
        page = self._extents[int(self._which[index])][start : start + self._page_bytes]
        return page.view(self.dtype).view(self.page_shape)

    @property
    def device(self) -> torch.device:
        """Where the extents are; the CPU when there is none."""
        return self._extents[0].device if self._extents else torch.device("cpu")

    def addresses(self) -> npt.NDArray[np.int64]:
        """[pages] int64, the address of each."""
        bases = np.array([extent.data_ptr() for extent in self._extents], dtype=np.int64)
        return bases[self._which] + self._starts


def addresses_of(pages: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    """[pages] int64, the address of each, whichever kind of sequence they are."""
    if isinstance(pages, ExtentPages):
        return pages.addresses()
    return np.fromiter((page.data_ptr() for page in pages), dtype=np.int64, count=len(pages))


def to_device(values: npt.NDArray[np.int64] | npt.NDArray[np.int32], device: torch.device) -> Tensor:
    """A small table of any shape on a device. The host does not wait for the copy."""
    table = torch.from_numpy(values)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
