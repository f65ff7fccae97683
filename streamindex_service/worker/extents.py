"""Device memory for pages, extent by extent.

PyTorch's allocator cuts a freed piece up for the next smaller one, and a piece of which a part is in use goes back to
nobody: extents shorter than the others, which the governor makes of what a budget has left, came to hold several times
their own bytes that way, until a tile within its reservation found no memory. So a freed extent stays whole, for the
next of its length, until somebody finds none: then all such go back to the device, and nothing remains to be cut.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from streamindex_service.worker.device import Device


class MissingMemoryError(Exception):
    """An extent whose allocation failed, or what was to be made of it, was named."""


class Extents:
    """Extents by their numbers, and on a GPU those that wait to be used again.

    stream: in which pages are copied to them, None on a CPU. They are its own memory for the allocator: a copy that
    goes on in one that was given back is made before any copy to whatever is there next. Who reads them in another
    stream is done with it before they are given back.
    """

    def __init__(self, device: Device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._stream = stream
        self._extents: dict[int, torch.Tensor] = {}  # [bytes] uint8
        self._spare: defaultdict[int, list[torch.Tensor]] = defaultdict(list)  # by their bytes

    def __getitem__(self, extent_id: int) -> torch.Tensor:
        """[bytes] uint8. Raises MissingMemoryError."""
        extent = self._extents.get(extent_id)
        if extent is None:
            raise MissingMemoryError(f"extent {extent_id}")
        return extent

    @property
    def size_bytes(self) -> int:
        """Device memory of those that are in use."""
        return sum(extent.numel() for extent in self._extents.values())

    @property
    def spare_bytes(self) -> int:
        """Device memory of those that wait."""
        return sum(size * len(extents) for size, extents in list(self._spare.items()))

    def allocate(self, extent_id: int, extent_bytes: int) -> None:
        """Take device memory. Raises torch.OutOfMemoryError."""
        spare = self._spare.get(extent_bytes)
        if spare:
            self._extents[extent_id] = spare.pop()
        else:
            with torch.cuda.stream(self._stream):
                device = self._device.torch_device
                self._extents[extent_id] = torch.empty(extent_bytes, dtype=torch.uint8, device=device)

    def free(self, extent_id: int) -> None:
        """Give it back. An extent whose allocation failed is not there."""
        extent = self._extents.pop(extent_id, None)
        if extent is not None and self._device.is_cuda:
            self._spare[extent.numel()].append(extent)

    def give_up_spares(self) -> None:
        """Give the device what waits, and what its allocator keeps."""
        self._spare.clear()
        if self._device.is_cuda:
            torch.cuda.empty_cache()
