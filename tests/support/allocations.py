"""What a piece of work allocates, counted as a device's allocator counts it: by the calls that issue the work."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

ROUNDED_BYTES = 512  # of every tensor, by the allocator of CUDA devices


class Allocations(TorchDispatchMode):
    """Tensors that operations make while this is entered, for as long as anybody holds them: `peak_bytes` at most.

    What is made within an operation and gone with it does not count; nor what numpy has made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._held_bytes = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id_of(each) for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for each in tree_flatten(result)[0]:
            if isinstance(each, torch.Tensor) and id_of(each) not in given:
                self._note(each.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        number = storage._cdata
        known = self._known.get(number)
        if known is not None and known() is not None:
            return
        size_bytes = -(-storage.nbytes() // ROUNDED_BYTES) * ROUNDED_BYTES
        self._known[number] = weakref.ref(storage)
        self._held_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        weakref.finalize(storage, self._gone, size_bytes)

    def _gone(self, size_bytes: int) -> None:
        self._held_bytes -= size_bytes


def id_of(tensor: torch.Tensor) -> int:
    """Of the memory that it lies in."""
    return tensor.untyped_storage()._cdata
