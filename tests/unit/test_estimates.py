"""What work takes: bytes against the operation's own plans, seconds against what was observed."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import pytest

from streamindex_service.core.estimates import DeviceSpeed, TopkWork
from streamindex_service.core.sizes import KeyFormat
from streamindex_service.frontend.index_tiles import workspace_terms
from streamindex_service.ipc.v1 import worker_pb2
from streamindex_service.ops.topk import IMPLEMENTATIONS
from streamindex_service.ops.topk.plan import Shape, plan_chunked, plan_triton

MIB = 1 << 20
SHAPES = list(itertools.product((1, 8, 128), (300, 70_000, 1_000_000), (1, 512, 4096), (1, 64)))


def work_of(implementation: str, heads: int = 64, keys: int = 10_000, top_k: int = 512, **others) -> TopkWork:
    """As the frontend makes it of what a worker says."""
    message = worker_pb2.WorkspaceTerms(**asdict(IMPLEMENTATIONS[implementation].terms(others.get("device", "cpu"))))
    return TopkWork(KeyFormat.BF16, heads, 128, keys, top_k, others.get("want_scores", False), workspace_terms(message))


@pytest.mark.parametrize(("implementation", "device"), [("triton", "cuda"), ("chunked", "cpu"), ("chunked", "cuda")])
@pytest.mark.parametrize(("rows", "keys", "top_k", "heads"), SHAPES)
def test_the_workspace_asked_for_is_what_all_rows_at_once_take(implementation, device, rows, keys, top_k, heads):
    shape = Shape(rows, heads, 128, keys, top_k, "bf16", 2)
    asked = work_of(implementation, heads, keys, top_k, device=device).workspace_bytes(rows, keys)
    offered = max(16 * MIB, asked)
    if implementation == "triton":
        plan = plan_triton(shape, offered)
    else:
        plan = plan_chunked(shape, offered, on_cuda=device == "cuda")
    assert plan.query_chunk == rows
    assert plan.key_tile >= keys
    assert plan.workspace_bytes <= asked
    assert plan.workspace_bytes >= 0.98 * asked or asked < 64 * MIB


def test_rows_that_see_few_keys_ask_for_little():
    work = work_of("triton", keys=1_000_000)
    assert work.workspace_bytes(64, 1000) < work.workspace_bytes(64, 1_000_000) / 100


def test_an_implementation_without_a_plan_is_given_more():
    planned, unplanned = (work_of(name) for name in ("triton", "reference"))
    assert unplanned.workspace_bytes(8, 10_000) > planned.workspace_bytes(8, 10_000)


def test_staging_is_what_a_tile_brings_and_takes():
    work = work_of("triton", want_scores=True)
    exact = 64 * 128 * 2 + 64 * 4 + 8 + 512 * 8
    assert 10 * exact <= work.staging_bytes(10) < 10 * exact + 4 * 256


def test_operations_grow_with_what_rows_see():
    work = work_of("triton", keys=1000)
    assert work.flop(3) == 2 * 3 * 1000 * 64 * 128
    assert work.flop(3, 10) == 2 * 3 * 10 * 64 * 128
    assert work.flop(3, 0) == 1


def test_before_anything_was_measured_there_is_a_guess():
    speed = DeviceSpeed()
    assert not speed.measured
    assert speed.seconds(10**10) == pytest.approx(1.0)
    assert speed.rows(10**9, 0.1, 1000) == 1


def test_small_work_says_nothing_about_large():
    speed = DeviceSpeed()
    speed.observe(10**12, 0.01)  # 100 TFLOP/s
    for _ in range(1000):
        speed.observe(10**6, 0.001)  # a launch
    assert speed.seconds(10**12) == pytest.approx(0.01)
    assert speed.seconds(10**6) == pytest.approx(0.001)
    assert speed.rows(10**10, 0.01, 1000) == 100


def test_rows_that_see_few_keys_make_large_tiles():
    """A prefill begins with rows of hardly any work: what they take says nothing of rows that see more."""
    speed = DeviceSpeed()
    speed.observe(10**5, 0.0003)  # a row at the beginning: all of it is the launch
    assert speed.rows(10**5, 0.1, 112) == 112
    speed.observe(112 * 10**5, 0.0004)
    assert speed.rows(10**7, 0.1, 112) == 112


def test_work_between_two_sizes_lies_between_them():
    speed = DeviceSpeed()
    speed.observe(2**20, 0.001)
    speed.observe(2**30, 0.002)
    times = [speed.seconds(2**size) for size in range(20, 31)]
    assert times == sorted(times)
    assert times[0] == pytest.approx(0.001)
    assert times[-1] == pytest.approx(0.002)


def test_a_first_tile_that_compiled_its_kernels_is_not_believed():
    speed = DeviceSpeed()
    speed.observe(10**12, 15.0)
    speed.observe(10**12, 0.004)
    assert speed.seconds(10**12) == pytest.approx(0.004)


def test_one_slow_tile_among_many_says_little():
    speed = DeviceSpeed()
    for _ in range(5):
        speed.observe(10**12, 0.004)
    speed.observe(10**12, 4.0)
    assert speed.seconds(10**12) < 0.005


ROW_FLOP = 2 * 65_536 * 64 * 128


@pytest.mark.parametrize("rows", [2, 32, 128, 240])
def test_a_size_whose_first_tile_compiled_its_kernels_is_tried_again(rows):
    """However small the tiles that are right, and though no tile has that size any more."""
    speed = DeviceSpeed()
    for _ in range(3):
        speed.observe(ROW_FLOP, 0.0004)
    speed.observe(rows * ROW_FLOP, 2.0)
    for _ in range(40):
        chosen = speed.rows(ROW_FLOP, 0.1, 240)
        speed.observe(chosen * ROW_FLOP, 0.0004 + 2e-6 * chosen)
    assert speed.rows(ROW_FLOP, 0.1, 240) == 240


def test_a_size_that_is_slow_is_tried_ever_less_often():
    """As where larger work is of another shape, or does not fit what it works in."""
    speed = DeviceSpeed()
    slow = []
    for number in range(20_000):
        chosen = speed.rows(ROW_FLOP, 0.1, 240)
        speed.observe(chosen * ROW_FLOP, 3.0 if chosen >= 64 else 0.0004 + 2e-6 * chosen)
        slow += [number] * (chosen >= 64)
    assert 2 < len(slow) < 40
    assert len([number for number in slow if number >= 10_000]) <= 4


def test_a_tile_is_not_so_short_that_most_of_it_is_overhead():
    speed = DeviceSpeed()
    speed.observe(10**9, 0.005)  # one row, nearly all of it overhead
    for _ in range(10):
        rows = speed.rows(10**9, 0.003, 64)
        speed.observe(rows * 10**9, 0.005 + 1e-5 * rows)
    assert speed.rows(10**9, 0.003, 64) == 64


def test_next_to_no_work_is_no_measure_of_any_other():
    """A search of an empty layer has one operation and takes a millisecond; a common one is not hopeless for that."""
    speed = DeviceSpeed()
    guess = speed.seconds(10**9)
    speed.observe(1, 1e-3)
    assert speed.seconds(1) == pytest.approx(1e-3)
    assert speed.seconds(10**9) == guess
    assert speed.rows(10**6, 0.1, 5000) == DeviceSpeed().rows(10**6, 0.1, 5000)
    speed.observe(10**9, 2.0)
    assert speed.seconds(10**9) == pytest.approx(2.0)
    assert speed.seconds(3 * 10**9) == pytest.approx(6.0)


def test_a_device_that_slows_down_is_seen_to():
    speed = DeviceSpeed()
    speed.observe(10**12, 0.01)
    for _ in range(50):
        rows = speed.rows(10**10, 0.1, 10_000)
        speed.observe(rows * 10**10, rows * 10**10 / 1e13)
    assert speed.rows(10**10, 0.1, 10_000) == pytest.approx(100, rel=0.2)


@pytest.mark.parametrize("flop", [1, 10**3, 10**9, 10**15, 1 << 80])
def test_any_size_has_an_estimate(flop):
    speed = DeviceSpeed()
    for size in (1, 10**6, 10**12):
        speed.observe(size, 0.5)
    assert speed.seconds(flop) > 0
    assert 1 <= speed.rows(flop, 0.1, 50) <= 50
