"""The demo's parts: data, check, passages."""

from __future__ import annotations

import pytest
import torch

from streamindex_service.demo.options import DemoOptions
from streamindex_service.demo.passages import best_passages, excerpt
from streamindex_service.demo.verify import Verifier
from streamindex_service.demo.workload import load_workload, quantise_keys, quantise_queries
from streamindex_service.ops.paged_keys import PagedKeys
from streamindex_service.ops.topk.api import topk

SMALL = DemoOptions(synthetic=True, keys=300, queries=200, heads=4, head_dim=32, ratio=2, top_k=9)


def answers(options: DemoOptions) -> tuple[Verifier, torch.Tensor, torch.Tensor]:
    """A verifier, all rows, and their right answers."""
    workload = load_workload(options)
    rows = torch.arange(workload.rows)
    q, w, positions = workload.select(rows)
    keys = PagedKeys.from_contiguous(workload.k, workload.scales)
    found = topk(q, w, keys, positions, ratio=workload.ratio, top_k=options.top_k, implementation="reference")
    return Verifier(workload, options.top_k, "cpu"), rows, found.indices


def test_every_row_is_checked_when_there_is_time() -> None:
    verifier, rows, indices = answers(SMALL)
    told: list[int] = []
    result = verifier.check(rows, indices, told.append, time_limit_s=60.0)
    assert (result.checked_rows, result.wrong_rows) == (200, 0)
    assert told[-1] == 100


def test_a_sample_is_checked_when_there_is_none() -> None:
    verifier, rows, indices = answers(SMALL)
    result = verifier.check(rows, indices, lambda _: None, time_limit_s=1e-9)
    assert (result.checked_rows, result.wrong_rows) == (8, 0)


def test_each_wrong_row_counts() -> None:
    verifier, rows, indices = answers(SMALL)
    indices[17, 0], indices[150] = indices[17, 1], -2
    assert verifier.check(rows, indices, lambda _: None).wrong_rows == 2


def test_data_is_the_same_for_the_same_seed() -> None:
    first, again, other = (load_workload(DemoOptions(synthetic=True, keys=64, queries=8, seed=s)) for s in (1, 1, 2))
    assert torch.equal(first.k, again.k)
    assert torch.equal(first.q, again.q)
    assert not torch.equal(first.k, other.k)


def test_blocks_are_the_whole_search_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamindex_service.demo.workload._DISTINCT_QUERY_BYTES", 70 * 4 * 32 * 2)
    monkeypatch.setattr("streamindex_service.demo.workload._BLOCK_BYTES", 32 * 4 * 32 * 2)
    workload = load_workload(SMALL)
    assert len(workload.q) == 70
    assert workload.repeats
    blocks = list(workload.blocks())
    whole = [torch.cat(parts) for parts in zip(*blocks, strict=True)]
    expected = workload.select(torch.arange(200))
    assert all(torch.equal(a, b) for a, b in zip(whole, expected, strict=True))
    assert max(len(block[0]) for block in blocks) == 32
    assert int(workload.positions[-1]) == 300 * 2 - 1


def test_quantised_scores_are_near() -> None:
    generator = torch.Generator().manual_seed(0)
    k, q = torch.randn((5, 16), generator=generator), torch.randn((2, 3, 16), generator=generator)
    w = torch.ones((2, 3))
    values, scales = quantise_keys(k)
    torch.testing.assert_close(values.float() * scales[:, None], k, rtol=0.07, atol=1e-2)
    q_values, gates = quantise_queries(q, w)
    torch.testing.assert_close(q_values.float() * gates[..., None], q, rtol=0.07, atol=1e-2)


def test_passages_join_neighbours_and_weigh_ranks() -> None:
    words = [f"word{i}" for i in range(400)]
    text = " ".join(words)
    spans, at = [], 0
    for word in words:
        spans.append((at, at + len(word)))
        at += len(word) + 1
    passages = best_passages([300, 100, 102, 104, -1, -1], text, spans, limit=2)
    assert [(p.first_token, p.last_token, p.keys) for p in passages] == [(100, 104, 3), (300, 300, 1)]
    assert "word100 word101 word102 word103 word104" in passages[0].text
    assert passages[1].best_rank == 0


def test_an_excerpt_is_one_short_line_of_whole_words() -> None:
    text = "first second\nthird   fourth " + "x " * 500
    assert excerpt(text, 6, 12, before=3, after=8) == "… second third …"
    assert len(excerpt(text, 0, len(text))) < 260


def test_the_pipeline_s_check_finds_what_is_wrong():
    from rich.console import Console

    from streamindex_service.demo import pipeline

    options = DemoOptions(pipeline=True, keys=50, queries=9, heads=2, head_dim=16, attention_heads=2, window=5, top_k=4)
    data = pipeline._make(options)
    rows, indices = torch.arange(9), torch.arange(36, dtype=torch.int32).view(9, 4)
    keys = torch.cat([data.kv.data, data.window.data]).double()
    recent = data.index.positions[:, None] - 4 + torch.arange(5) + 50
    gathered = keys[torch.cat([recent, indices], dim=1)]
    logits = data.scale * torch.einsum("thd,tjd->thj", data.q.double(), gathered)
    sink = data.sink.double()[None, :, None].expand(9, 2, 1)
    weights = torch.softmax(torch.cat([logits, sink], dim=2), dim=2)[:, :, :-1]
    out = torch.einsum("thj,tjd->thd", weights, gathered).to(torch.bfloat16)
    console = Console(quiet=True)
    assert not pipeline._check(console, data, rows, indices, out)[0].any()
    out[3, 1, 500] += 0.5
    out[7] = torch.nan
    wrong, largest = pipeline._check(console, data, rows, indices, out)
    assert torch.nonzero(wrong).flatten().tolist() == [3, 7]
    assert largest > 1
