"""Small work with known answers: no worker takes any other before it has got it right."""

from __future__ import annotations

import torch

from streamindex_service.ops.cached_attention import ATTENTION_TERMS, CachedSequence, attend_cached
from streamindex_service.ops.kv_rows import KvFormat, KvRows
from streamindex_service.ops.paged_keys import PAGE_KEYS, PagedKeys
from streamindex_service.ops.paged_kv_rows import PagedKvRows
from streamindex_service.ops.sparse_attention import IMPLEMENTATIONS as ATTENTION
from streamindex_service.ops.sparse_attention import check_sparse_attention
from streamindex_service.ops.topk import KeySequence, topk_sequences
from streamindex_service.worker.device import Device, supported

_ROWS, _HEADS, _HEAD_DIM, _KEYS, _TOP_K = 3, 16, 64, 2 * PAGE_KEYS + 37, 32
_WINDOW, _SCALE = 8, 0.125


def run(device: Device, implementation: str, attention: str) -> None:
    """A search, and attention where the device has it for bf16 rows.

    Raises RuntimeError when an answer is wrong, or whatever the device raises.
    """
    search(device, implementation)
    if ATTENTION[attention].supports(device.torch_device, KvFormat.BF16):
        attend(device, attention)


def search(device: Device, implementation: str) -> None:
    """Search small integers, which every format represents exactly, in two sequences, and compare bit for bit with the
    reference.

    Raises as `run` does.
    """
    generator = torch.Generator().manual_seed(20240229)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    dtype = supported(device)[implementation][0].torch_dtype
    q, w = integers(_ROWS, _HEADS, _HEAD_DIM).to(dtype), integers(_ROWS, _HEADS)
    layers = [integers(_KEYS, _HEAD_DIM).to(dtype) for _ in range(2)]
    scales = torch.ones(_KEYS) if dtype is torch.float8_e4m3fn else None
    positions = torch.tensor([299, 300, _KEYS - 1])

    def found(name: str, on: torch.device) -> torch.Tensor:
        keys = [PagedKeys.from_contiguous(k.to(on), None if scales is None else scales.to(on)) for k in layers]
        sequences = [KeySequence(2, keys[0]), KeySequence(_ROWS - 2, keys[1])]
        return topk_sequences(
            q.to(on), w.to(on), sequences, positions, ratio=1, top_k=_TOP_K, implementation=name
        ).indices.cpu()

    answer = found(implementation, device.torch_device)
    if not torch.equal(answer, found("reference", torch.device("cpu"))):
        raise RuntimeError(f"the canary search of {implementation} on {device.name} gave a wrong answer")


def attend(device: Device, implementation: str) -> None:
    """Attention of a few queries of two sequences, of which one names fewer rows than it has, against float64.

    Raises as `run` does.
    """
    generator = torch.Generator().manual_seed(20240301)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    q, rows = drawn(_ROWS, _HEADS, _HEAD_DIM), drawn(_KEYS, _HEAD_DIM)
    indices = torch.randint(0, 20, (_ROWS, _TOP_K), generator=generator, dtype=torch.int32)
    indices[0] = torch.randint(-1, _KEYS, (_TOP_K,), generator=generator, dtype=torch.int32)
    positions = torch.tensor([_KEYS - 1, 5, 7])
    pages = _pages(rows.to(device.torch_device))
    # the first query is of a sequence of all rows, the others of one of the first 20
    few = PagedKvRows(KvFormat.BF16, _HEAD_DIM, 20, pages[:1])
    every = PagedKvRows(KvFormat.BF16, _HEAD_DIM, _KEYS, pages)
    answer = attend_cached(
        q.to(device.torch_device), indices.to(device.torch_device), positions,
        [CachedSequence(1, every, every), CachedSequence(2, few, few)],
        window=_WINDOW, scale=_SCALE, sink=None, value_dim=_HEAD_DIM, implementation=implementation,
        workspace_bytes=ATTENTION_TERMS[implementation].least_bytes, want_lse=True,
    )  # fmt: skip
    assert answer.lse is not None
    tokens = positions[:, None] - _WINDOW + 1 + torch.arange(_WINDOW)
    entries = torch.cat([tokens.clamp(min=-1).to(torch.int32), indices], dim=1)
    report = check_sparse_attention(
        answer.out.cpu(), answer.lse.cpu(), q, KvRows(KvFormat.BF16, rows), entries, scale=_SCALE, sink=None
    )
    if report.wrong_rows:
        raise RuntimeError(f"the canary attention of {implementation} on {device.name} gave a wrong answer")


def _pages(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows [n, head_dim] in pages, the last one first."""
    count = -(-len(rows) // PAGE_KEYS)
    row_bytes = rows.shape[1] * rows.element_size()
    extent = torch.zeros((count, PAGE_KEYS * row_bytes), dtype=torch.uint8, device=rows.device)
    for number in range(count):
        part = rows[PAGE_KEYS * number : PAGE_KEYS * (number + 1)]
        extent[count - 1 - number, : len(part) * row_bytes] = part.contiguous().view(torch.uint8).flatten()
    return tuple(extent[count - 1 - number] for number in range(count))
