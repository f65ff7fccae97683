"""Bit for bit the same answer, whatever the chunk, tile, workspace, thread count or neighbours."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamindex_service.ops import KeyFormat, PagedKeys
from streamindex_service.ops.topk import MIN_WORKSPACE_BYTES
from tests.ops.cases import Inputs, kernel_device, make_inputs, same, small_plan

ROWS = 13


def _inputs(key_format: KeyFormat, heads: int, head_dim: int, device: str) -> Inputs:
    return make_inputs(
        rows=ROWS, heads=heads, head_dim=head_dim, keys=1234, key_format=key_format, top_k=100, device=device
    )


def _repeats(implementation: str, inputs: Inputs, chunk: int, tile: int, rows: tuple[int, int]) -> bool:
    whole = inputs.search(implementation)
    part = inputs.row(*rows)
    found = part.search(implementation, plan=small_plan(inputs, chunk, tile * 256))
    window = slice(*rows)
    return same(found, type(found)(whole.indices[window], whole.scores[window]))


windows = st.tuples(st.integers(0, ROWS - 1), st.integers(1, ROWS)).map(
    lambda pair: (pair[0], min(ROWS, pair[0] + pair[1]))
)
tilings = st.tuples(st.integers(1, ROWS), st.integers(1, 5))
formats = st.sampled_from(
    [(KeyFormat.BF16, 64, 128), (KeyFormat.FP8_E4M3, 3, 48), (KeyFormat.FP32, 17, 16), (KeyFormat.FP16, 32, 80)]
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=formats, tiling=tilings, rows=windows)
def test_chunked_repeats(shape, tiling: tuple[int, int], rows: tuple[int, int]) -> None:
    assert _repeats("chunked", _inputs(*shape, "cpu"), *tiling, rows)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=formats, tiling=tilings, rows=windows)
def test_triton_repeats(shape, tiling: tuple[int, int], rows: tuple[int, int]) -> None:
    assert _repeats("triton", _inputs(*shape, kernel_device()), *tiling, rows)


@pytest.mark.parametrize(
    "heads_dim", [(64, 128), (3, 48), (1, 16), (128, 256), (32, 112)], ids=lambda pair: f"H{pair[0]}-D{pair[1]}"
)
def test_chunked_repeats_across_thread_counts(heads_dim: tuple[int, int]) -> None:
    inputs = _inputs(KeyFormat.BF16, *heads_dim, "cpu")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(inputs.search("chunked"))
    finally:
        torch.set_num_threads(before)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_workspace_does_not_change_the_answer(implementation: str) -> None:
    inputs = _inputs(KeyFormat.BF16, 16, 32, kernel_device() if implementation == "triton" else "cpu")
    assert same(inputs.search(implementation), inputs.search(implementation, workspace_bytes=MIN_WORKSPACE_BYTES))


def test_longer_sequence_does_not_change_earlier_rows() -> None:
    # what a row cannot see must not move a bit of it: the same rows against a longer cache
    short = make_inputs(rows=4, heads=8, head_dim=32, keys=700, key_format=KeyFormat.BF16, top_k=50, positions=690)
    longer = torch.cat([torch.cat(short.keys.pages)[:700], torch.full((900, 32), 3.0, dtype=torch.bfloat16)])
    for implementation in ("chunked", "triton"):
        device = kernel_device() if implementation == "triton" else "cpu"
        found = Inputs(short.q.to(device), short.w.to(device), _keys(longer[:700], device), 690, 1, 50).search(
            implementation
        )
        other = Inputs(short.q.to(device), short.w.to(device), _keys(longer, device), 690, 1, 50).search(implementation)
        assert same(found, other)


def _keys(k: torch.Tensor, device: str) -> PagedKeys:
    return PagedKeys.from_contiguous(k.to(device))


def test_growing_chunks_change_no_bit_and_fit_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamindex_service.ops.topk import triton as kernels

    inputs = make_inputs(
        rows=60, heads=4, head_dim=16, keys=1500, key_format=KeyFormat.BF16, top_k=20, ratio=1, device=kernel_device(),
        positions=torch.arange(0, 1500, 25),
    )  # fmt: skip
    chunks = []
    search_chunk = kernels._search_chunk
    monkeypatch.setattr(kernels, "_search_chunk", lambda *a: chunks.append(a[1:]) or search_chunk(*a))
    fixed = inputs.search("triton", plan=small_plan(inputs, 8, 1536))
    assert [(start, stop) for start, stop, _ in chunks] == [(max(n - 8, 0), n) for n in range(60, 0, -8)]
    chunks.clear()
    grown = inputs.search("triton", plan=replace(small_plan(inputs, 8, 1536), grow=True))  # the arena asserts its size
    assert same(grown, fixed)
    rows = [stop - start for start, stop, _ in chunks]
    assert sum(rows) == 60
    assert max(rows) > 8
    assert all(count >= 8 for count in rows[:-1])  # the first rows, which come last, are what is left
    assert len(rows) < 8
