"""The benchmarks of the governor, at sizes that a CPU does in seconds."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from benchmarks import governor_memory, governor_mix
from benchmarks.device_memory import Sampler
from benchmarks.governor_memory import MemoryRow
from benchmarks.governor_mix import MixRow, Sizes

GOOD = MemoryRow(
    "t", "a case", "bf16", 1.0, None, None, 0.95, "what fits", peak_bytes=110, wrong_rows=0, budget_bytes=100,
    context_bytes=10, evicted_pages=1,
)  # fmt: skip


def test_settings_are_read_from_text():
    assert governor_mix.sections('worker.tile_s=0.05 memory.extent_bytes=1048576 worker.device="cpu"') == {
        "worker": {"tile_s": 0.05, "device": "cpu"},
        "memory": {"extent_bytes": 1048576},
    }
    settings = governor_mix.settings_of("cpu", "worker.tile_s=0.05")
    assert settings["worker"] == {"device": "cpu", "tile_s": 0.05}


def test_a_mix_is_measured():
    sizes = Sizes(governor_mix.TINY, keys=1024, rows=512, victim_keys=512, steps=10, floods=1)
    row = governor_mix.measure("cpu", sizes, "scheduler.short_tile_s=0.002")
    assert row.wrong_rows == 0
    assert row.checked_rows == governor_mix.CHECKED_ROWS + 2
    for figure in (row.rows_per_s, row.flood_rows_per_s, row.victim_alone_ms_p50, row.victim_beside_ms_p50):
        assert figure > 0
    assert row.victim_alone_ms_p99 >= row.victim_alone_ms_p50


def test_a_step_that_waits_too_long_beside_floods_is_no_result():
    row = MixRow(
        "t", "a case", "bf16", 1.0, None, None, 0.5, "p99 alone", peak_bytes=1, wrong_rows=0, victim_alone_ms_p99=4.0,
        victim_beside_ms_p99=8.0,
    )  # fmt: skip
    assert governor_mix.broken_promises(row) == []
    slow = replace(row, ratio=0.49, victim_beside_ms_p99=8.2)
    assert governor_mix.broken_promises(slow) == ["8.20 ms of p99 beside the floods, 4.00 ms alone"]
    assert governor_mix.broken_promises(replace(slow, settings="worker.tile_s=0.05")) == []


def test_four_times_what_fits_is_measured():
    row = governor_memory.measure("cpu", governor_memory.sizes_of("cpu", quick=True))
    broken = governor_memory.broken_promises(replace(row, ratio=1.0))  # how fast it is here says nothing
    assert broken == []
    assert row.peak_bytes <= row.budget_bytes
    assert row.samples > 1
    assert (len(row.over_round_s), len(row.fitting_round_s)) == (row.repeats, row.repeats)
    assert row.seconds == pytest.approx(sum(row.over_round_s) / row.repeats)


def test_the_error_of_a_ratio_is_that_of_its_rounds():
    assert governor_memory.ratio_error([1.0], [2.0]) is None
    assert governor_memory.ratio_error([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(0.0)  # each has the same
    # without one of the three: 5/3, 4/4 and 3/3, their mean 11/9; 2/3 of the sum of (4/9)², (2/9)² and (2/9)²
    assert governor_memory.ratio_error([1.0, 2.0, 3.0], [2.0, 1.0, 2.0]) == pytest.approx((2 / 3 * 24 / 81) ** 0.5)


def test_the_work_is_done_both_ways_before_it_counts(monkeypatch):
    sizes, seen = governor_memory.sizes_of("cpu", quick=True), []
    right = governor_memory.run_work

    def noted(callers, at_once, outcome):
        seen.append(at_once)
        right(callers, at_once, outcome)

    monkeypatch.setattr(governor_memory, "run_work", noted)
    governor_memory.measure("cpu", sizes)
    assert seen == [sizes.fitting, sizes.caches] * (1 + sizes.rounds)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peak_bytes": 111}, "111 bytes in use"),
        ({"failures": 2}, "2 tiles without memory"),
        ({"worker_restarts": 1}, "1 lost workers"),
        ({"wrong_rows": 3}, "3 wrong answers"),
        ({"ratio": 0.89}, "0.89 of the throughput"),
        ({"evicted_pages": 0}, "nothing was evicted"),
    ],
)
def test_every_promise_is_looked_at(change, said):
    assert governor_memory.broken_promises(GOOD) == []
    (found,) = governor_memory.broken_promises(replace(GOOD, **change))
    assert said in found


def test_a_sampler_keeps_the_most_and_tells_what_fails():
    values, read_all = iter([3, 9, 4]), threading.Event()

    def read() -> int:
        value = next(values, 0)
        if not value:
            read_all.set()
        return value

    with Sampler(read, 0.0001) as sampler:
        assert read_all.wait(20)
    assert sampler.most == 9
    assert sampler.samples >= 4
    with pytest.raises(ZeroDivisionError), Sampler(lambda: 1 // 0, 0.0001):
        pass
