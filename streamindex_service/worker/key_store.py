"""Pages of keys and KV rows on the device.

The frontend decides what lies where; here are the extents (device allocations that pages are cut from), the segments
(host memory that pages come from) and the views (the pages of a layer, in order, as an operation takes them).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from streamindex_service.ipc.segments import Segment
from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.ops.extent_pages import ExtentPages, addresses_of
from streamindex_service.ops.formats import KeyFormat
from streamindex_service.ops.kv_rows import KvFormat
from streamindex_service.ops.paged_keys import PAGE_KEYS, SCALE_BYTES, PagedKeys
from streamindex_service.ops.paged_kv_rows import PagedKvRows, row_sizes
from streamindex_service.worker.device import Device
from streamindex_service.worker.extents import Extents, MissingMemoryError
from streamindex_service.worker.promotions import MemoryRanges

# streamindex.v1.KeyFormat -> the operations' formats
FORMATS = {1: KeyFormat.BF16, 2: KeyFormat.FP16, 3: KeyFormat.FP32, 4: KeyFormat.FP8_E4M3}
# streamindex.v1.KvFormat -> likewise
KV_FORMATS = {1: KvFormat.BF16, 2: KvFormat.FP8_D512, 3: KvFormat.FP8_D576}


# of some pages: the extent of each, and where in it the page begins
_Slots = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass
class _MappedSegment:
    segment: Segment
    tensor: torch.Tensor  # [bytes] uint8


class SegmentMap:
    """Segments that the frontend passed on, as byte tensors; page-locked on a GPU, so that copies are asynchronous."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._mapped: dict[int, _MappedSegment] = {}

    def add(self, message: pb.MapSegment, fd: int) -> None:
        """Map a segment. Raises ValueError for one that is not what was announced."""
        # CUDA page-locks only what is mapped writable; elsewhere the keys of the host stay read-only for this process.
        writable = message.writable or self._device.is_cuda
        try:
            segment = Segment.receive(fd, message.segment_bytes, writable=writable)
        except BaseException:
            os.close(fd)
            raise
        tensor = torch.frombuffer(segment.map, dtype=torch.uint8) if writable else _read_only_tensor(segment)
        if self._device.is_cuda:
            result = int(_cuda_runtime().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0))
            if result != 0:
                del tensor
                segment.close()
                raise RuntimeError(f"cudaHostRegister failed with {result}")
        self._mapped[message.segment_id] = _MappedSegment(segment, tensor)

    def drop(self, segment_id: int) -> None:
        """Unmap a segment."""
        mapped = self._mapped.pop(segment_id)
        if self._device.is_cuda:
            _cuda_runtime().cudaHostUnregister(mapped.tensor.data_ptr())
        del mapped.tensor
        mapped.segment.close()

    def bytes_at(self, segment_id: int, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """A part of a segment, [size_bytes] uint8."""
        tensor = self._mapped[segment_id].tensor
        assert 0 <= offset_bytes <= offset_bytes + size_bytes <= tensor.numel()
        return tensor[offset_bytes : offset_bytes + size_bytes]

    def tensor_at(self, span: pb.Span, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor that lies in a segment."""
        elements = 1
        for size in shape:
            elements *= size
        return self.bytes_at(span.segment_id, span.offset_bytes, elements * dtype.itemsize).view(dtype).view(shape)


class KeyStore:
    """Views of pages, and the extents in which these lie. stream: in which pages are copied there, None on a CPU."""

    def __init__(self, device: Device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self.extents = Extents(device, stream)
        self._views: dict[int, PagedKeys] = {}
        self._kv_views: dict[int, PagedKvRows] = {}
        self._memory: dict[int, MemoryRanges] = {}  # of views that were asked about
        self._partial: dict[int, list[_Slots]] = {}

    def bytes_at(self, extent_id: int, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """A part of an extent, [size_bytes] uint8. Raises MissingMemoryError."""
        return self.extents[extent_id][offset_bytes : offset_bytes + size_bytes]

    def define_views(self, message: pb.DefineViews) -> None:
        """Add pages to views; of each, the last part makes it usable. Raises MissingMemoryError for a missing extent.

        What raises has changed nothing, of no view of the message: given again, it finds what it found before.
        """
        partial: dict[int, list[_Slots]] = {}
        made: dict[int, PagedKeys | PagedKvRows] = {}
        for each in message.views:
            part = _numbers(each.extent_ids), _numbers(each.extent_offsets)
            slots = [*self._partial.get(each.view_id, ()), part]
            if each.complete:
                made[each.view_id] = self._made(each, slots)
            else:
                partial[each.view_id] = slots
        self._partial.update(partial)
        for view_id, view in made.items():
            self._partial.pop(view_id, None)
            if isinstance(view, PagedKvRows):
                self._kv_views[view_id] = view
            else:
                self._views[view_id] = view

    def _made(self, message: pb.DefineView, slots: Sequence[_Slots]) -> PagedKeys | PagedKvRows:
        """A view whose pages are all there."""
        extent_ids, starts = (np.concatenate(parts) for parts in zip(*slots, strict=True))
        used, which = np.unique(extent_ids, return_inverse=True)
        extents = [self.extents[int(extent_id)] for extent_id in used]
        row_bytes, scale_bytes = _row_sizes(message)

        def pages(skipped_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> ExtentPages:
            return ExtentPages(extents, which, starts + skipped_bytes, shape, dtype)

        if message.kv_format:
            whole = pages(0, (PAGE_KEYS * (row_bytes + scale_bytes),), torch.uint8)
            return PagedKvRows(KV_FORMATS[message.kv_format], message.head_dim, message.length_keys, whole)
        key_format = FORMATS[message.key_format]
        values = pages(0, (PAGE_KEYS, message.head_dim), key_format.torch_dtype)
        scales = pages(PAGE_KEYS * row_bytes, (PAGE_KEYS,), torch.float32) if key_format.has_scales else None
        return PagedKeys(key_format, message.head_dim, message.length_keys, values, scales)

    def view(self, view_id: int) -> PagedKeys:
        """A view. Raises MissingMemoryError."""
        if view_id not in self._views:
            raise MissingMemoryError(f"view {view_id}")
        return self._views[view_id]

    def kv_view(self, view_id: int) -> PagedKvRows:
        """A view of KV rows. Raises MissingMemoryError."""
        if view_id not in self._kv_views:
            raise MissingMemoryError(f"view {view_id}")
        return self._kv_views[view_id]

    def memory_of(self, view_id: int) -> MemoryRanges:
        """Where the pages of a view lie; nowhere, if it is not there."""
        found = self._memory.get(view_id)
        if found is None:
            view = self._views.get(view_id) or self._kv_views.get(view_id)
            if view is None:
                return MemoryRanges.of(_numbers(()), 0)
            found = self._memory[view_id] = MemoryRanges.of(addresses_of(view.pages), view.page_bytes)
        return found

    def drop_view(self, view_id: int) -> None:
        """Forget a view. One that could not be made is not there."""
        self._views.pop(view_id, None)
        self._kv_views.pop(view_id, None)
        self._memory.pop(view_id, None)
        self._partial.pop(view_id, None)


def make_page_tables(views: Iterable[PagedKeys], implementation: str) -> None:
    """On the device, of views that have none yet, in the present stream; where an implementation reads them."""
    if implementation == "triton":
        for view in views:
            if view.length:
                _ = view.table_addresses


def _row_sizes(message: pb.DefineView) -> tuple[int, int]:
    """Bytes of a row of the view's pages, and of the scales beside it."""
    if message.kv_format:
        return row_sizes(KV_FORMATS[message.kv_format], message.head_dim)
    key_format = FORMATS[message.key_format]
    return message.head_dim * key_format.element_bytes, SCALE_BYTES * key_format.has_scales


def _numbers(values: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.array(list(values), dtype=np.int64)


def _read_only_tensor(segment: Segment) -> torch.Tensor:
    # torch has no read-only tensors and warns of read-only buffers; the mapping is read-only and stands guard.
    address = np.frombuffer(segment.map, dtype=np.uint8).ctypes.data
    return torch.frombuffer((ctypes.c_uint8 * segment.size_bytes).from_address(address), dtype=torch.uint8)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
