"""A small search with a known answer: no worker takes work before it has got it right."""

from __future__ import annotations

import torch

from streamindex_service.ops.paged_keys import PAGE_KEYS, PagedKeys
from streamindex_service.ops.topk import topk
from streamindex_service.worker.device import Device, supported

_ROWS, _HEADS, _HEAD_DIM, _KEYS, _TOP_K = 3, 16, 64, 2 * PAGE_KEYS + 37, 32


def run(device: Device, implementation: str) -> None:
    """Search small integers, which every format represents exactly, and compare bit for bit with the reference.

    Raises RuntimeError when the answer is wrong, or whatever the device raises.
    """
    generator = torch.Generator().manual_seed(20240229)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    dtype = supported(device)[implementation][0].torch_dtype
    q, k = integers(_ROWS, _HEADS, _HEAD_DIM).to(dtype), integers(_KEYS, _HEAD_DIM).to(dtype)
    w = integers(_ROWS, _HEADS)
    scales = torch.ones(_KEYS) if dtype is torch.float8_e4m3fn else None
    positions = torch.tensor([5, 300, _KEYS - 1])

    def search(name: str, on: torch.device) -> torch.Tensor:
        keys = PagedKeys.from_contiguous(k.to(on), None if scales is None else scales.to(on))
        return topk(q.to(on), w.to(on), keys, positions, ratio=1, top_k=_TOP_K, implementation=name).indices.cpu()

    answer = search(implementation, device.torch_device)
    if not torch.equal(answer, search("reference", torch.device("cpu"))):
        raise RuntimeError(f"the canary search of {implementation} on {device.name} gave a wrong answer")
