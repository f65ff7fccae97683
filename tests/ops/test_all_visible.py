"""Every query over all rows that it sees: as if they were named, whatever else there is."""

from __future__ import annotations

import os

import pytest
import torch

from streamindex_service.ops.cached_attention import AllVisible, CachedSequence, attend_cached
from streamindex_service.ops.kv_rows import KvFormat, KvRows
from streamindex_service.ops.sparse_attention import AttentionResult, check_sparse_attention, sparse_attention
from streamindex_service.ops.sparse_attention.plan import Plan, attention_tiles
from tests.ops.attention_cases import paged
from tests.ops.test_cached_attention import drawn
from tests.support.attention import joined

RATIO = 8
TRITON = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
IMPLEMENTATION = pytest.mark.parametrize("implementation", ["chunked", pytest.param("triton", marks=TRITON)])
# of each sequence: compressed rows, and where its queries stand
PARTS = [(300, [0, 6, 7, 2390, 2399, 2400, 90_000]), (1, [8]), (0, [3]), (40, []), (260, [2079, 2080])]


def attend(sequences, rows, positions, seed, implementation, window) -> tuple[torch.Tensor, AttentionResult]:
    """Queries, the same at a position whatever is asked beside it, and their answers."""
    key_dim = rows[0].key_dim
    drawn_q = [
        torch.randn((2, key_dim), generator=torch.Generator().manual_seed(seed + at)).bfloat16() for at in positions
    ]
    q = torch.stack(drawn_q)
    return q, attend_cached(
        q, AllVisible(RATIO), torch.tensor(positions), sequences, window=window, scale=key_dim**-0.5,
        sink=torch.tensor([0.5, -torch.inf]), value_dim=min(key_dim, 512), implementation=implementation,
        workspace_bytes=16 << 20, parts=4, want_lse=True,
    )  # fmt: skip


@IMPLEMENTATION
@pytest.mark.parametrize("window", [0, 9], ids=lambda w: f"W{w}")
@pytest.mark.parametrize(("kv_format", "key_dim"), [(KvFormat.BF16, 64), (KvFormat.FP8_D512, 512)])
def test_all_visible_rows_are_attended(kv_format, key_dim, window, implementation):
    compressed = [drawn(max(1, count), key_dim, kv_format, 40 + count) for count, _ in PARTS]
    recent = drawn(2401, key_dim, kv_format, 7)
    sequences = []
    for rows, (count, at) in zip(compressed, PARTS, strict=True):
        held = paged(KvRows(kv_format, rows.data[:count], None if rows.scales is None else rows.scales[:count]))
        sequences.append(CachedSequence(len(at), held, paged(recent)))
    positions = [each for _, at in PARTS for each in at]
    if window:  # beyond the window's rows there is nothing to judge by
        sequences[0], positions = (
            CachedSequence(6, sequences[0].compressed, paged(recent)),
            [each for each in positions if each != 90_000],
        )
    q, answer = attend(sequences, compressed, positions, 1000, implementation, window)
    first = 0
    for sequence, rows in zip(sequences, compressed, strict=True):
        at = torch.tensor(positions[first : first + sequence.tokens], dtype=torch.int64)
        part = slice(first, first + sequence.tokens)
        first += sequence.tokens
        if not len(at):
            continue
        row = torch.arange(300)
        visible = torch.where((row < ((at + 1) // RATIO)[:, None]) & (row < sequence.compressed.length), row, -1)
        tokens = at[:, None] - window + 1 + torch.arange(window)
        flat = torch.cat([torch.where(tokens >= 0, tokens + rows.rows, -1), visible], dim=1).to(torch.int32)
        report = check_sparse_attention(
            answer.out[part], answer.lse[part], q[part], joined(rows, recent), flat.contiguous(), scale=key_dim**-0.5,
            sink=torch.tensor([0.5, -torch.inf]),
        )  # fmt: skip
        assert report.wrong_rows == 0, report
        nothing = (flat < 0).all(dim=1)
        assert torch.isposinf(answer.lse[part][nothing]).all()
        assert not answer.out[part][nothing].any()


@IMPLEMENTATION
@pytest.mark.parametrize("window", [0, 9], ids=lambda w: f"W{w}")
def test_neighbours_and_rows_that_come_later_change_no_bit(implementation, window):
    """How an index row is shared out follows from its own length, not from that of the longest."""
    rows, recent = drawn(1500, 64, KvFormat.BF16, 3), paged(drawn(2500, 64, KvFormat.BF16, 4))
    positions = [2399, 700, 12, 0]

    def held(count: int) -> CachedSequence:
        return CachedSequence(1, paged(KvRows(rows.format, rows.data[:count])), recent)

    _, together = attend([held(1500), held(300), held(2), held(0)], [rows], positions, 5, implementation, window)
    for number, (count, at) in enumerate(zip((300, 88, 1, 0), positions, strict=True)):
        _, alone = attend([held(count)], [rows], [at], 5, implementation, window)
        assert torch.equal(alone.out[0], together.out[number]), at
        assert torch.equal(alone.lse[0], together.lse[number]), at


@TRITON
def test_a_row_alone_is_taken_in_parts_and_the_same_bits_among_others(monkeypatch):
    """Of given indices too, where they are many."""
    from streamindex_service.ops.sparse_attention import triton

    rows = drawn(900, 16, KvFormat.BF16, 8)
    generator = torch.Generator().manual_seed(9)
    tokens, heads, width = 37, 64, 300
    q = torch.randn((tokens, heads, 16), generator=generator).bfloat16()
    indices = torch.randint(-1, 900, (tokens, width), generator=generator, dtype=torch.int32)
    seen = []
    real = triton.combine

    def counted(problem, plan, *parts):
        seen.append((plan.splits, problem.tokens))
        real(problem, plan, *parts)

    monkeypatch.setattr(triton, "combine", counted)

    def attend_some(part: slice) -> AttentionResult:
        count = len(q[part])
        sequence = CachedSequence(count, paged(rows), paged(KvRows(rows.format, rows.data[:0])))
        return attend_cached(
            q[part].contiguous(), indices[part].contiguous(), torch.zeros(count, dtype=torch.int64), [sequence],
            window=0, scale=0.25, sink=None, value_dim=16, implementation="triton", workspace_bytes=16 << 20,
            parts=2, want_lse=True,
        )  # fmt: skip

    whole = attend_some(slice(0, tokens))
    assert seen == [(2, tokens)]
    for chosen in (slice(0, 1), slice(36, 37), slice(5, 22)):
        some = attend_some(chosen)
        assert torch.equal(some.out, whole.out[chosen])
        assert torch.equal(some.lse, whole.lse[chosen])
    seen.clear()
    in_turn = sparse_attention(
        q, rows, indices, scale=0.25, value_dim=16, implementation="triton", want_lse=True,
        plan=Plan(0, token_chunk=16, splits=2, tiles=attention_tiles("bf16", heads, 16, 16), find_ends=False),
    )  # fmt: skip
    assert seen == [(2, 16), (2, 16), (2, 5)]
    assert torch.equal(in_turn.out, whole.out)
    assert torch.equal(in_turn.lse, whole.lse)
    report = check_sparse_attention(whole.out, whole.lse, q, rows, indices, scale=0.25, sink=None)
    assert report.wrong_rows == 0, report


@IMPLEMENTATION
def test_no_query_at_all(implementation):
    rows = drawn(20, 64, KvFormat.BF16, 3)
    answer = attend_cached(
        torch.empty((0, 2, 64), dtype=torch.bfloat16), AllVisible(RATIO), torch.empty(0, dtype=torch.int64),
        [CachedSequence(0, paged(rows), paged(rows))], window=3, scale=1.0, sink=None, value_dim=64,
        implementation=implementation, workspace_bytes=16 << 20,
    )  # fmt: skip
    assert answer.out.shape == (0, 2, 64)
