"""Extents of many lengths on a CUDA device whose allocator may take no more than a budget."""

from __future__ import annotations

import pytest
import torch

from streamindex_service.worker.device import probe
from streamindex_service.worker.extents import Extents

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20
BUDGET = 512 * MIB
CUT = 20 * MIB  # what the allocator takes for pieces of 1 to 10 MiB


@pytest.fixture
def capped():
    device = probe("cuda:0")
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved(device.torch_device)
    torch.cuda.set_per_process_memory_fraction((taken + BUDGET) / device.total_bytes, device.torch_device)
    yield device
    torch.cuda.set_per_process_memory_fraction(1.0, device.torch_device)


def test_short_extents_hold_no_more_than_their_bytes(capped):
    """Long ones, then short ones, as a budget's rest has room for: all that they leave is there for a tile."""
    extents = Extents(capped)
    for number in range(12):
        extents.allocate(number, 32 * MIB)
    for number in range(12):
        extents.free(number)
    short = [25, 18, 13, 29, 11, 21, 16, 27]
    for number, size in enumerate(short):
        try:
            extents.allocate(number, size * MIB)
        except torch.OutOfMemoryError:  # as the worker does it
            extents.give_up_spares()
            extents.allocate(number, size * MIB)
    extents.give_up_spares()
    tile = torch.empty(BUDGET - sum(short) * MIB - CUT - 2 * len(short) * MIB, dtype=torch.uint8, device="cuda:0")
    assert tile.numel() > 280 * MIB
    assert extents.size_bytes == sum(short) * MIB
