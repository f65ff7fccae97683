"""Queries of several sequences in one run: each as if it were alone, and as float64 says."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

from streamindex_service.ops import cached_attention
from streamindex_service.ops.cached_attention import CachedSequence, attend_cached, triton
from streamindex_service.ops.kv_rows import KvFormat, KvRows
from streamindex_service.ops.paged_kv_rows import JoinedKvRows, PagedKvRows
from streamindex_service.ops.sparse_attention import check_sparse_attention
from tests.ops.attention_cases import paged
from tests.ops.test_cached_attention import BY_FORMAT, drawn
from tests.support.attention import joined, part

WIDTH = 20
TRITON = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
IMPLEMENTATION = pytest.mark.parametrize("implementation", ["chunked", pytest.param("triton", marks=TRITON)])


@dataclass
class Sequence:
    """Rows of one sequence, and a few queries on it."""

    compressed: KvRows
    recent: KvRows
    q: torch.Tensor
    indices: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def drawn(cls, kv_format: KvFormat, key_dim: int, keys: int, positions: list[int], seed: int) -> Sequence:
        generator = torch.Generator().manual_seed(seed)
        tokens = len(positions)
        return cls(
            part(drawn(max(keys, 1), key_dim, kv_format, seed), slice(0, keys)),
            drawn(max(positions, default=0) + 3, key_dim, kv_format, seed + 1),
            torch.randn((tokens, 3, key_dim), generator=generator).to(torch.bfloat16),
            torch.randint(-3, keys + 9, (tokens, WIDTH), generator=generator, dtype=torch.int32),
            torch.tensor(positions, dtype=torch.int64),
        )

    def cached(self, first_page: int = 0) -> CachedSequence:
        """From some page of window rows on."""
        pages = paged(self.recent)
        first = 256 * first_page
        held = PagedKvRows(pages.format, pages.key_dim, pages.length - first, pages.pages[first_page:])
        return CachedSequence(len(self.q), paged(self.compressed), held, first)


def attend(sequences: list[Sequence], cached: list[CachedSequence], window: int, implementation: str = "chunked"):
    key_dim = sequences[0].q.shape[2]
    return attend_cached(
        torch.cat([each.q for each in sequences]), torch.cat([each.indices for each in sequences]),
        torch.cat([each.positions for each in sequences]), cached, window=window, scale=key_dim**-0.5,
        sink=torch.tensor([0.5, -torch.inf, 2.0]), value_dim=512 if key_dim >= 512 else key_dim,
        implementation=implementation, workspace_bytes=16 << 20, want_lse=True,
    )  # fmt: skip


def ragged(kv_format: KvFormat, key_dim: int) -> tuple[list[Sequence], list[CachedSequence]]:
    """Some name fewer rows than their sequence has, some more; early and late in the sequence, one without queries,
    two of the same rows, and one without any compressed row."""
    made = [
        Sequence.drawn(kv_format, key_dim, keys, positions, seed)
        for seed, (keys, positions) in enumerate(
            [(600, [790]), (15, [3, 4, 0]), (300, [600, 590]), (40, [300, 301, 700]), (0, [5]), (90, []), (512, [0])]
        )
    ]
    twin = Sequence.drawn(kv_format, key_dim, 600, [777], 30)
    twin.compressed, twin.recent = made[0].compressed, made[0].recent
    first_pages = [2, 0, 1, 0, 0, 0, 0]
    cached = [each.cached(page) for each, page in zip(made, first_pages, strict=True)]
    cached.append(CachedSequence(1, cached[0].compressed, cached[0].window_rows, cached[0].first_window_row))
    return [*made, twin], cached


@BY_FORMAT
@pytest.mark.parametrize("window", [0, 100], ids=lambda w: f"W{w}")
def test_every_sequence_is_answered_as_if_it_were_alone(kv_format, key_dim, window):
    sequences, cached = ragged(kv_format, key_dim)
    together = attend(sequences, cached, window)
    first = 0
    for sequence, held in zip(sequences, cached, strict=True):
        count = len(sequence.q)
        out, lse = together.out[first : first + count], together.lse[first : first + count]
        first += count
        if not count:
            continue
        alone = attend([sequence], [held], window)
        assert torch.equal(out, alone.out)
        assert torch.equal(lse, alone.lse)
        keys = sequence.compressed.rows
        both = joined(sequence.compressed, sequence.recent)
        tokens = sequence.positions[:, None] - window + 1 + torch.arange(window)
        recent = torch.where(tokens >= 0, tokens + keys, -1)
        named = torch.where((sequence.indices >= 0) & (sequence.indices < keys), sequence.indices, -1)
        flat = torch.cat([recent.to(torch.int32), named], dim=1).contiguous()
        sink = torch.tensor([0.5, -torch.inf, 2.0])
        report = check_sparse_attention(out, lse, sequence.q, both, flat, scale=key_dim**-0.5, sink=sink)
        assert report.wrong_rows == 0, report
    assert first == len(together.out)


@TRITON
@pytest.mark.parametrize("window", [0, 20], ids=lambda w: f"W{w}")
@pytest.mark.parametrize(("kv_format", "key_dim"), [(KvFormat.BF16, 64), (KvFormat.FP8_D512, 512)])
def test_the_kernels_answer_together_as_alone(kv_format, key_dim, window):
    made = [Sequence.drawn(kv_format, key_dim, keys, [position], keys) for keys, position in [(300, 560), (10, 7)]]
    cached = [made[0].cached(1), made[1].cached()]
    together = attend(made, cached, window, "triton")
    for row, (sequence, held) in enumerate(zip(made, cached, strict=True)):
        alone = attend([sequence], [held], window, "triton")
        assert torch.equal(together.out[row : row + 1], alone.out)
        assert torch.equal(together.lse[row : row + 1], alone.lse)
    right = attend(made, cached, window)
    assert torch.allclose(together.out.float(), right.out.float(), atol=0.02)


def test_what_is_launched_does_not_depend_on_how_many_sequences_there_are(monkeypatch):
    sequences, cached = ragged(KvFormat.BF16, 64)
    launched = []
    for name in ("gather_rows", "assemble_index_rows", "sparse_attention"):
        real = getattr(cached_attention.api, name)

        def counted(*arguments, real=real, name=name, **others):
            launched.append(name)
            return real(*arguments, **others)

        monkeypatch.setattr(cached_attention.api, name, counted)
    attend(sequences, cached, 100)
    assert sorted(launched) == ["assemble_index_rows", "gather_rows", "sparse_attention"]


@TRITON
def test_the_kernels_are_launched_once_for_all_sequences(monkeypatch):
    made = [
        Sequence.drawn(KvFormat.BF16, 64, keys, [position], keys) for keys, position in [(300, 560), (10, 7), (9, 3)]
    ]
    launched = []
    for module, name in ((triton, "run_places"), (cached_attention.api, "sparse_attention")):
        real = getattr(module, name)

        def counted(*arguments, real=real, name=name, **others):
            launched.append(name)
            return real(*arguments, **others)

        monkeypatch.setattr(module, name, counted)
    attend(made, [each.cached() for each in made], 20, "triton")
    assert launched == ["run_places", "sparse_attention"]


def test_no_row_is_copied_that_nobody_attends(monkeypatch):
    sequences, cached = ragged(KvFormat.BF16, 64)
    copied = []
    real = cached_attention.api.gather_rows
    monkeypatch.setattr(
        cached_attention.api,
        "gather_rows",
        lambda rows, wanted, *others, **named: copied.append(len(wanted)) or real(rows, wanted, *others, **named),
    )
    attend(sequences, cached, 100)
    of_indices = sum(min(len(each.q) * WIDTH, each.compressed.rows) for each in sequences)
    windows = 100 + 5 + 110 + 500 + 6 + 0 + 1 + 100
    assert copied == [of_indices + windows]


def test_sequences_must_agree():
    sequences, cached = ragged(KvFormat.BF16, 64)
    with pytest.raises(ValueError, match="12 queries, there are 11 positions"):
        attend([*sequences[1:]], cached, 0)
    other = Sequence.drawn(KvFormat.BF16, 80, 30, [3], 1)
    with pytest.raises(ValueError, match="different formats"):
        attend(sequences[:1] + sequences[:1], [cached[0], other.cached()], 0)


def test_joined_rows_are_numbered_by_pages():
    first, other = drawn(300, 64, KvFormat.BF16, 1), drawn(5, 64, KvFormat.BF16, 2)
    empty = PagedKvRows(KvFormat.BF16, 64, 0, ())
    joined = JoinedKvRows((paged(first), empty, paged(other)))
    assert joined.first_rows() == [0, 512, 512]
    assert joined.length == 768
    data = torch.zeros((2, 128), dtype=torch.uint8)
    cached_attention.gather_rows(joined, torch.tensor([299, 516]), data)
    assert torch.equal(data.view(torch.bfloat16), torch.stack([first.data[299], other.data[4]]))
