"""Rows of several sequences in one run: each as if its sequence were alone, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamindex_service.ops import KeyFormat
from streamindex_service.ops.topk import KeySequence, Order, TopkInputError, topk_sequences
from tests.ops.cases import kernel_device, same, small_plan
from tests.ops.sequence_cases import Step

TOP_K, RATIO = 20, 2
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
FORMATS = [(KeyFormat.BF16, 16, 32), (KeyFormat.FP8_E4M3, 3, 48), (KeyFormat.FP16, 1, 16)]


def drawn(shape, lengths, positions, device, **options):
    return Step.drawn(shape, lengths, positions, device, top_k=TOP_K, ratio=RATIO, **options)


def device_of(implementation):
    return kernel_device() if implementation == "triton" else "cpu"


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", FORMATS, ids=["bf16", "fp8", "fp16"])
@pytest.mark.parametrize("order", list(Order), ids=["by-score", "by-index"])
@pytest.mark.parametrize("want_scores", [True, False], ids=["scores", "indices"])
def test_a_ragged_step(implementation, shape, order, want_scores):
    """Long and short, empty, unseen, sorted and not; positions as large as they may be."""
    lengths = [700, 13, 0, 256, 300, 520]
    positions = [[1398, 1399], [40], [5], [511, 3, 200], [2**62], [2**31 - 2, 2**31 - 1, 2**31]]
    step = drawn(shape, lengths, positions, device_of(implementation))
    options = {"order": order, "want_scores": want_scores}
    assert same(step.together(implementation, **options), step.alone(implementation, **options))


@IMPLEMENTATIONS
def test_sequences_that_share_their_keys(implementation):
    """Forks: the same pages, up to different lengths."""
    step = drawn(FORMATS[0], [600], [[1199]], device_of(implementation), values="integers")
    (first,) = step.sequences
    pages = first.keys.pages
    forks = [
        replace(first, keys=replace(first.keys, length=length, pages=pages[: -(-length // 256)]))
        for length in (300, 512)
    ]
    step = Step([first, *forks])
    assert same(step.together(implementation), step.alone(implementation))


@IMPLEMENTATIONS
def test_none_sees_a_key(implementation):
    step = drawn(FORMATS[0], [0, 9], [[7], [0]], device_of(implementation))
    found = step.together(implementation)
    assert (found.indices == -1).all()
    assert (found.scores == -torch.inf).all()


in_any_order = st.lists(st.integers(0, 2000), min_size=1, max_size=3)
# Where a row comes to see a key of another block: one that is thought to see fewer would have no score of it.
edges = st.builds(lambda block, before: RATIO * 256 * block - before, st.integers(1, 3), st.integers(0, 8))
in_line = st.builds(
    lambda first, rows: list(range(first, first + rows)),
    st.one_of(edges, st.integers(0, 2000), st.integers(2**31 - 9, 2**31)),
    st.integers(1, 9),
)
sizes = st.lists(st.tuples(st.integers(0, 900), st.one_of(in_any_order, in_line)), min_size=1, max_size=6)


def _cut(implementation, sizes_drawn, shape, chunk, tile, order):
    lengths, positions = zip(*sizes_drawn, strict=True)
    step = drawn(shape, lengths, positions, device_of(implementation), values="integers")
    plan = small_plan(step.sequences[0], chunk, 256 * tile)
    assert same(step.together(implementation, plan=plan, order=order), step.alone(implementation, order=order))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(sizes, st.sampled_from(FORMATS), st.integers(1, 9), st.integers(1, 3), st.sampled_from(list(Order)))
def test_any_cut_of_chunked(drawn, shape, chunk, tile, order):
    _cut("chunked", drawn, shape, chunk, tile, order)


def test_a_chunk_that_begins_within_a_sequence():
    """Its rows are the last of the sequence, of which some see a block of keys more than the first."""
    step = drawn(
        FORMATS[0], [300, 600], [[3], list(range(2 * 256 - 9, 2 * 256 + 9))], kernel_device(), values="integers"
    )
    for chunk in (1, 5, 12):
        plan = small_plan(step.sequences[1], chunk, 512)
        assert same(step.together("triton", plan=plan), step.alone("triton"))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(sizes, st.sampled_from(FORMATS), st.integers(1, 9), st.integers(1, 3), st.sampled_from(list(Order)))
def test_any_cut_of_triton(drawn, shape, chunk, tile, order):
    """Chunks of rows end within a sequence, tiles of keys within a page of another."""
    _cut("triton", drawn, shape, chunk, tile, order)


def test_one_launch_for_all_parts_whose_rows_follow_each_other(monkeypatch):
    """Scores of the others are computed part by part, of those alone that are seen; the selection is of all rows."""
    from streamindex_service.ops.topk import triton
    from streamindex_service.ops.topk.scores import PortableScores

    positions = [[1399], [599, 600], [7], [9, 3], [179]]
    step = drawn(FORMATS[0], [700, 300, 0, 90, 90], positions, kernel_device())
    launched = []
    select, of_rows, of_parts = triton._launch_select, PortableScores.of_rows, PortableScores.of_parts

    def selected(run, buffers, chunk, *others):
        launched.append((chunk.start, chunk.stop))
        select(run, buffers, chunk, *others)

    def scored(self, problem, scores, positions, start, rows, tile_start, keys):
        launched.append((start, start + rows, keys))
        of_rows(self, problem, scores, positions, start, rows, tile_start, keys)

    def scored_together(self, problem, scores, parts, start, tile_start, keys):
        launched.append((parts.count, parts.most_rows, start, keys))
        of_parts(self, problem, scores, parts, start, tile_start, keys)

    monkeypatch.setattr(triton, "_launch_select", selected)
    monkeypatch.setattr(PortableScores, "of_rows", scored)
    monkeypatch.setattr(PortableScores, "of_parts", scored_together)
    expected = step.alone("reference")
    assert torch.equal(step.together("triton").indices, expected.indices)
    assert launched == [(3, 2, 0, 700), (4, 6, 5), (0, 7)]


@pytest.mark.parametrize("rows", [[1], [2, 1], [3, 0], []], ids=str)
def test_rows_that_are_of_no_sequence(rows):
    step = drawn(FORMATS[0], [30, 30], [[9], [9]], "cpu")
    keys = step.sequences[0].keys
    q, w = (torch.cat([getattr(each, name) for each in step.sequences]) for name in ("q", "w"))
    with pytest.raises(TopkInputError, match="sequences"):
        topk_sequences(
            q, w, [KeySequence(count, keys) for count in rows], torch.zeros(2, dtype=torch.int64), ratio=1, top_k=1,
            implementation="chunked",
        )  # fmt: skip


def test_keys_of_two_kinds():
    one, other = (drawn(shape, [30], [[9]], "cpu").sequences[0] for shape in FORMATS[:2])
    sequences = [KeySequence(1, each.keys) for each in (one, other)]
    with pytest.raises(TopkInputError, match=r"sequences\[1\]"):
        topk_sequences(
            torch.cat([one.q, one.q]), torch.cat([one.w, one.w]), sequences,
            torch.zeros(2, dtype=torch.int64), ratio=1, top_k=1, implementation="chunked",
        )  # fmt: skip
