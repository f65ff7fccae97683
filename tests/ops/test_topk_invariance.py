"""A row's answer is its own: neighbours, their order, chunk, tile, workspace and repetition change no bit of it."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamindex_service.ops import KeyFormat
from streamindex_service.ops.topk import MIN_WORKSPACE_BYTES, Order, TopkResult, plan_for
from tests.ops.cases import Inputs, kernel_device, make_inputs, same, small_plan

ROWS, KEYS, TOP_K, RATIO = 6, 600, 20, 2


@dataclass(frozen=True)
class Batch:
    """How the rows of a search are put before an implementation again.

    strangers: rows of other queries at other positions that stand before, between and after them.
    """

    order: list[int]
    strangers: list[int]
    chunk: int
    tile: int
    group: int
    repeats: int


batches = st.builds(
    Batch,
    order=st.permutations(range(ROWS)),
    strangers=st.lists(st.integers(0, ROWS), max_size=4).map(sorted),
    chunk=st.integers(1, ROWS + 4),
    tile=st.integers(1, 3),
    group=st.sampled_from([16, 32]),
    repeats=st.integers(1, 2),
)
formats = st.sampled_from([(KeyFormat.BF16, 16, 32), (KeyFormat.FP8_E4M3, 3, 48), (KeyFormat.FP16, 1, 16)])


def _inputs(shape: tuple[KeyFormat, int, int], device: str, seed: int = 0) -> Inputs:
    key_format, heads, head_dim = shape
    visible = [600, 41, 0, 400, 20, 578] if seed == 0 else [4, 600, 450, 0, 599, 61]
    positions = torch.tensor([seen * RATIO - 1 if seen else 0 for seen in visible])
    return make_inputs(
        rows=ROWS, heads=heads, head_dim=head_dim, keys=KEYS, key_format=key_format, top_k=TOP_K, ratio=RATIO,
        device=device, positions=positions, seed=seed,
    )  # fmt: skip


def _together(rows: Inputs, others: Inputs, batch: Batch) -> tuple[Inputs, list[int]]:
    """The rows among strangers, against the same keys, and where each row of `batch.order` stands."""
    lines: list[tuple[Inputs, int]] = [(rows, row) for row in batch.order]
    for number, place in enumerate(reversed(batch.strangers)):
        lines.insert(place, (others, number))
    q = torch.stack([source.q.view(torch.uint8)[row] for source, row in lines]).view(rows.q.dtype)
    w = torch.stack([source.w[row] for source, row in lines])
    positions = torch.stack([source.positions[row] for source, row in lines])
    places = [place for place, (source, _) in enumerate(lines) if source is rows]
    return Inputs(q, w, rows.keys, positions, RATIO, TOP_K), places


def _picked(result: TopkResult, rows: list[int]) -> TopkResult:
    assert result.scores is not None
    return TopkResult(result.indices[rows], result.scores[rows])


def _invariant(implementation: str, shape: tuple[KeyFormat, int, int], batch: Batch, device: str) -> None:
    rows, others = _inputs(shape, device), _inputs(shape, device, seed=1)
    expected = _picked(rows.search(implementation), batch.order)
    mixed, places = _together(rows, others, batch)
    plan = small_plan(mixed, batch.chunk, 256 * batch.tile, query_group=batch.group)
    for _ in range(batch.repeats):
        assert same(_picked(mixed.search(implementation, plan=plan), places), expected)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=formats, batch=batches)
def test_chunked(shape: tuple[KeyFormat, int, int], batch: Batch) -> None:
    _invariant("chunked", shape, batch, "cpu")


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=formats, batch=batches)
def test_triton(shape: tuple[KeyFormat, int, int], batch: Batch) -> None:
    _invariant("triton", shape, batch, kernel_device())


@pytest.mark.parametrize("heads", [5, 6, 7])
def test_a_chunk_of_one_row(heads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        inputs = _inputs((KeyFormat.FP16, heads, 16), "cpu")
        assert same(inputs.search("chunked", plan=small_plan(inputs, 1, 1024)), inputs.search("chunked"))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_a_workspace_that_cuts_differently(implementation: str) -> None:
    device = kernel_device() if implementation == "triton" else "cpu"
    # long lists make a few hundred rows too many for the least workspace
    inputs = make_inputs(
        rows=210,
        heads=1,
        head_dim=16,
        keys=4100,
        key_format=KeyFormat.BF16,
        top_k=4096,
        values="integers",
        device=device,
    )

    def tiles(workspace_bytes: int) -> tuple[int, int]:
        plan = plan_for(
            implementation, device, KeyFormat.BF16, rows=210, heads=1, head_dim=16, keys=4100, top_k=4096,
            workspace_bytes=workspace_bytes,
        )  # fmt: skip
        assert plan is not None
        return plan.query_chunk, plan.key_tile

    assert tiles(MIN_WORKSPACE_BYTES) != tiles(256 << 20) == (210, 4352)
    least = inputs.search(implementation, order=Order.INDEX, workspace_bytes=MIN_WORKSPACE_BYTES)
    assert same(inputs.search(implementation, order=Order.INDEX, workspace_bytes=256 << 20), least)
