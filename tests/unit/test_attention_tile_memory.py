"""What a tile of attention allocates, against what is reserved for it: step by step as on a GPU, without kernels."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from streamindex_service.core.attention_estimates import AttentionTerms, AttentionWork
from streamindex_service.core.meter import LARGE_BYTES
from streamindex_service.core.sizes import KvFormat
from streamindex_service.core.specs import KvSpec
from streamindex_service.ops import kv_rows
from streamindex_service.ops.cached_attention import ATTENTION_TERMS, CachedSequence, api, attend_cached, copies
from streamindex_service.ops.extent_pages import ExtentPages
from streamindex_service.ops.paged_kv_rows import PagedKvRows
from streamindex_service.ops.sparse_attention import AttentionResult
from tests.support.allocations import Allocations

# Here no block is larger than the tensor that has it.
TERMS = replace(AttentionTerms(**asdict(ATTENTION_TERMS["triton"])), fixed_bytes=1 << 20)
WORKSPACE_BYTES = 16 << 20
V4, V4_PACKED = KvSpec(KvFormat.BF16, 512, 512, 64), KvSpec(KvFormat.FP8_D512, 512, 512, 128)
GLM, SMALL = KvSpec(KvFormat.FP8_D576, 576, 512, 64), KvSpec(KvFormat.BF16, 80, 64, 5)
NARROW = KvSpec(KvFormat.BF16, 16, 16, 1)
FORMATS = {
    KvFormat.BF16: kv_rows.KvFormat.BF16,
    KvFormat.FP8_D512: kv_rows.KvFormat.FP8_D512,
    KvFormat.FP8_D576: kv_rows.KvFormat.FP8_D576,
}

# spec, width, window, (query rows, tokens of the sequence, rows of its KV) of each part
TILES = [
    (V4, 512, 128, [(1, 9000, 2250)]),
    (V4, 512, 128, [(200, 200_000, 50_000)]),  # fewer named than there are
    (V4, 512, 128, [(300, 16_000, 4_000)]),  # all of them copied
    (V4, 512, 0, [(300, 300_000, 75_000)]),
    (V4, 2048, 128, [(1000, 40_000, 10_000)]),
    (V4_PACKED, 512, 128, [(400, 800_000, 200_000)]),
    (V4_PACKED, 1024, 128, [(900, 4_000, 1_000)]),
    (GLM, 2048, 0, [(64, 200_000, 200_000)]),
    (GLM, 2048, 0, [(1024, 200_000, 200_000)]),
    (SMALL, 300, 128, [(4000, 60_000, 15_000)]),  # the lists of rows are most of it
    (SMALL, 2048, 128, [(500, 3_000_000, 750_000)]),
    (NARROW, 2048, 0, [(2000, 2_200_000, 2_200_000)]),  # and the lists of what is copied
    (V4, 512, 128, [(1, 4000 + 5000 * number, 1000 + 1250 * number) for number in range(128)]),  # a decode step
    (V4, 512, 128, [(2, 900_000, 225_000)] * 50 + [(40, 8_000, 2_000)] * 3),  # some pick, some copy all
    (GLM, 2048, 128, [(4, 100_000, 100_000)] * 16),
]


def paged(spec: KvSpec, rows: int) -> PagedKvRows:
    """Rows whose memory nobody touches."""
    kv_format, pages = FORMATS[spec.kv_format], -(-rows // 256)
    size = spec.form.page_bytes
    starts = size * np.arange(pages, dtype=np.int64)
    extents = [torch.empty(pages * size, dtype=torch.uint8)]
    which = np.zeros(pages, dtype=np.int64)
    return PagedKvRows(kv_format, spec.key_dim, rows, ExtentPages(extents, which, starts, (size,), torch.uint8))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What the kernels write is allocated, and tables are copied to the device; no kernel runs."""

    def to_device(values, device):
        return torch.from_numpy(values).clone()

    def gather_rows(source, wanted, data, scales, *, implementation):
        table = to_device(source.word_table.numpy(), None)
        assert len(table)

    def assemble_index_rows(found, positions, *, window, **_):
        positions.clone()  # on the device
        return torch.empty((len(found), window + found.shape[1]), dtype=torch.int32)

    def sparse_attention(q, kv, entries, *, value_dim, want_lse, out, out_lse, **_):
        assert out is None
        out = torch.empty((*q.shape[:2], value_dim), dtype=torch.bfloat16)
        lse = torch.empty(q.shape[:2]) if want_lse else None
        ends = torch.empty(len(q), dtype=torch.int32)
        assert len(ends) == len(entries)
        return AttentionResult(out, lse)

    monkeypatch.setattr(copies, "to_device", to_device)
    for replaced in (gather_rows, assemble_index_rows, sparse_attention):
        monkeypatch.setattr(api, replaced.__name__, replaced)
    monkeypatch.setattr(api, "plan_for", lambda *_, **__: None)


@pytest.mark.parametrize("want_lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize(("spec", "width", "window", "parts"), TILES)
def test_a_tile_takes_what_is_reserved_for_it(as_on_a_gpu, spec, width, window, parts, want_lse):
    rows = sum(count for count, _, _ in parts)
    q = torch.empty((rows, spec.heads, spec.key_dim), dtype=torch.bfloat16)
    indices = torch.zeros((rows, width), dtype=torch.int32)
    positions = torch.cat([torch.arange(tokens - count, tokens) for count, tokens, _ in parts])
    sequences, estimate = [], 0
    for count, tokens, held in parts:
        span = count + window - 1 if window else 0
        first = max(0, (tokens - span) // 1024 * 1024)
        recent = paged(spec, tokens - first) if window else PagedKvRows(FORMATS[spec.kv_format], spec.key_dim, 0, ())
        sequences.append(CachedSequence(count, paged(spec, held), recent, first))
        work = AttentionWork(spec, held, width, window, want_lse, TERMS)
        estimate += work.tile_bytes(count, span)
    estimate += work.used_bytes(rows, WORKSPACE_BYTES)
    with Allocations() as allocations:
        tile = attend_cached(
            q.clone(), indices.clone(), positions, sequences, window=window, scale=1.0, sink=None,
            value_dim=spec.value_dim, implementation="triton", workspace_bytes=WORKSPACE_BYTES, want_lse=want_lse,
        )  # fmt: skip
    assert tile.out.shape == (rows, spec.heads, spec.value_dim)
    ratio = allocations.peak_bytes / estimate
    assert ratio <= 1.0, f"{allocations.peak_bytes} bytes, reserved were {estimate}"
    if estimate >= LARGE_BYTES:
        assert ratio >= 0.9, f"{allocations.peak_bytes} bytes, reserved were {estimate}"
