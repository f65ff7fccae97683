"""What a tile of attention allocates, against what is reserved for it: step by step as on a GPU, without kernels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from streamindex_service.core.meter import LARGE_BYTES
from streamindex_service.ops import paged_kv_rows
from streamindex_service.ops.cached_attention import api, copies, places, triton
from streamindex_service.ops.sparse_attention import AttentionResult
from streamindex_service.ops.sparse_attention.plan import AttentionKernel, Shape, plan_triton
from tests.support.allocations import Allocations
from tests.support.attention_tiles import ALL_VISIBLE, TERMS, TILES, WORKSPACE_BYTES, Tile

# here no block is larger than the tensor that has it
IN_PAGES = replace(TERMS, fixed_bytes=1 << 20)
# of an implementation that reads rows of one tensor, and takes nothing to copy them but a list
COPIED = replace(IN_PAGES, reads_pages=False, copied_row_bytes=8, index_entry_bytes=4, splits=False)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What the kernels write is allocated, and tables are copied to the device; no kernel runs."""

    def to_device(values, device):
        return torch.from_numpy(values).clone()

    def gather_rows(source, wanted, data, scales):
        assert len(source.unit_table(wanted.device))

    def assemble_index_rows(found, positions, *, window, **_):
        positions.clone()  # on the device
        return torch.empty((len(found), window + found.shape[1]), dtype=torch.int32)

    def plan_for(implementation, device, kv_format, *, workspace_bytes, parts, **shape):
        if implementation != "triton":
            return None
        return plan_triton(
            Shape(**shape, format_name=kv_format.value), workspace_bytes, 132, AttentionKernel.PORTABLE, parts
        )

    def sparse_attention(q, kv, entries, *, value_dim, want_lse, out, out_lse, plan, **_):
        assert out is None
        parts = torch.empty(0 if plan is None else plan.workspace_bytes, dtype=torch.uint8)
        out = torch.empty((*q.shape[:2], value_dim), dtype=torch.bfloat16)
        lse = torch.empty(q.shape[:2]) if want_lse else None
        ends = torch.empty(len(q), dtype=torch.int32)
        assert len(ends) == len(entries)
        del parts
        return AttentionResult(out, lse)

    for module in (api, copies, places, paged_kv_rows):
        monkeypatch.setattr(module, "to_device", to_device)
    monkeypatch.setattr(triton, "run_places", lambda *_: None)
    monkeypatch.setattr(api, "find_implementation", lambda name, *_: SimpleNamespace(takes_places=name == "triton"))
    for replaced in (gather_rows, assemble_index_rows, plan_for, sparse_attention):
        monkeypatch.setattr(api, replaced.__name__, replaced)


# Where rows are copied, those that see unequally many are in no tile together.
CASES = [
    (*tile, implementation, terms)
    for tile in [*TILES, *((spec, None, *rest) for spec, *rest in ALL_VISIBLE)]
    for implementation, terms in [("triton", IN_PAGES), ("chunked", COPIED)]
    if implementation == "triton" or tile[1] is not None or len({held for _, _, held in tile[3]}) == 1
]


@pytest.mark.parametrize("want_lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize(("spec", "width", "window", "parts", "implementation", "terms"), CASES)
def test_a_tile_takes_what_is_reserved_for_it(as_on_a_gpu, spec, width, window, parts, want_lse, implementation, terms):
    tile = Tile(spec, width, window, parts, want_lse)
    estimate = tile.estimate_bytes(terms, WORKSPACE_BYTES - TERMS.fixed_bytes + terms.fixed_bytes)
    sequences, (q, indices, positions) = tile.sequences("cpu"), tile.inputs()
    with Allocations() as allocations:
        named = None if indices is None else indices.clone()
        answer = tile.attend(q.clone(), named, positions, sequences, implementation)
    assert answer.out.shape == (tile.rows, spec.heads, spec.value_dim)
    ratio = allocations.peak_bytes / estimate
    assert ratio <= 1.0, f"{allocations.peak_bytes} bytes, reserved were {estimate}"
    if estimate >= LARGE_BYTES // 4:
        assert ratio >= 0.9, f"{allocations.peak_bytes} bytes, reserved were {estimate}"
