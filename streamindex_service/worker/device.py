"""Which device, and what it is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from streamindex_service.ops.formats import KeyFormat
from streamindex_service.ops.sparse_attention import IMPLEMENTATIONS as ATTENTION
from streamindex_service.ops.topk import IMPLEMENTATIONS

# Of a GPU's budget: the allocator cuts tensors of 1 to 10 MiB from segments of 20 MiB, smaller ones from segments of
# 2 MiB, each stream from its own, and keeps a segment while any of it is in use. On an H200 60 to 75 MiB were found
# free in such segments, beside tiles of 256 rows of V4-Flash.
UNTRACKED_BYTES = 96 << 20
# The default implementations; first that is supported wins.
_DEFAULTS = {"cuda": ("triton", "chunked"), "cpu": ("chunked",)}  # of topk and of attention alike


class UnusableDeviceError(RuntimeError):
    """The settings ask for a device or an implementation that is not here: starting again would not help."""


@dataclass(frozen=True)
class Device:
    """A device that exists. `total_bytes` is its memory."""

    torch_device: torch.device
    name: str
    total_bytes: int

    @property
    def is_cuda(self) -> bool:
        """True on a GPU."""
        return self.torch_device.type == "cuda"


def probe(wanted: str) -> Device:
    """Find the device: `cpu`, `cuda:N`, or `auto` (the first GPU, else the CPU). Raises UnusableDeviceError."""
    if wanted == "auto":
        wanted = "cuda:0" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cpu":
        return Device(device, "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UnusableDeviceError(f"device {wanted} is not there: torch sees no CUDA device")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise UnusableDeviceError(f"device {wanted} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    properties = torch.cuda.get_device_properties(index)
    return Device(torch.device("cuda", index), properties.name, properties.total_memory)


def reservable_bytes(device: Device, budget_bytes: int) -> int:
    """Of the memory budget, what may be reserved: all on a CPU; on a GPU not what its allocator rounds up and keeps."""
    if not device.is_cuda:
        return budget_bytes
    return budget_bytes - min(3 * budget_bytes // 8, UNTRACKED_BYTES + budget_bytes // 64)


def default_budget_bytes(device: Device) -> int:
    """The memory budget when none is set: most of a GPU's memory, a part of a CPU's (which the host's copies share)."""
    return int(device.total_bytes * (0.85 if device.is_cuda else 0.20))


def choose_implementation(wanted: str, device: Device) -> str:
    """The implementation asked for, or the device's default. Raises UnusableDeviceError listing the valid names."""
    names = supported(device)
    if wanted:
        if not names.get(wanted):
            raise UnusableDeviceError(
                f"implementation {wanted!r} does not run on {device.torch_device}; these do: {list(names)}"
            )
        return wanted
    return next(name for name in _DEFAULTS[device.torch_device.type] if names.get(name))


def choose_attention(device: Device) -> str:
    """The device's implementation of attention."""
    names = _DEFAULTS[device.torch_device.type]
    return next(name for name in names if ATTENTION[name].runs_on(device.torch_device))


def supported(device: Device) -> dict[str, list[KeyFormat]]:
    """Implementations that run on the device, and the formats that each takes there."""
    found = {
        name: [f for f in KeyFormat if implementation.supports(device.torch_device.type, f)]
        for name, implementation in IMPLEMENTATIONS.items()
    }
    return {name: formats for name, formats in found.items() if formats}
