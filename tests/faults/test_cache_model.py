"""Evictions, promotions, moves, spilling and dead workers cost no wrong answer: seeded histories against plain arrays.

A failure names its seed: python -m tests.support.cache_history SEED tells that history again, step by step, with
--spill on a host that is too small as well; tests.support.crowded_history tells those in which pages move together.
"""

from __future__ import annotations

import pytest

from streamindex_service.testing.service import RunningService
from tests.support.cache_history import CacheHistory, killer
from tests.support.calls import Calls
from tests.support.crowded_history import TWO_TILES, CrowdedHistory, stopper
from tests.support.services import SMALL_DEVICE, is_idle, small_host, wait_for

SEEDS = 4
SPILL_SEEDS = (3, 5, 7)  # those with much in them
CROWDED_SEED, CROWDED_STEPS = 4, 30


@pytest.fixture(scope="module")
def service():
    with RunningService(SMALL_DEVICE) as running:
        yield running


@pytest.fixture
def connection(service):
    with Calls(service.address) as calls:
        calls.wait_health(1)
        yield calls


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_answer_is_the_models(service, connection, seed):
    before = connection.load()
    history = CacheHistory(connection, killer(service), seed)
    try:
        history.run()
    except Exception as error:
        raise AssertionError(f"python -m tests.support.cache_history {seed}") from error
    after = connection.load()
    # It was about something: pages had to go and come back, and workers died.
    assert after.device.evicted_pages > before.device.evicted_pages + 10
    assert after.device.promoted_pages > before.device.promoted_pages + 50
    assert after.worker_restarts > before.worker_restarts
    wait_for(lambda: is_idle(connection.load()))
    host = connection.ledger("host")
    assert (host.reserved_bytes, connection.load().key_caches) == (0, 0)


@pytest.fixture(scope="module")
def spilling(tmp_path_factory):
    with RunningService(small_host(tmp_path_factory.mktemp("spill"))) as running, Calls(running.address) as calls:
        calls.wait_health(1)
        yield calls, killer(running)


@pytest.mark.parametrize("seed", SPILL_SEEDS)
def test_every_answer_is_the_models_from_disk_as_well(spilling, seed):
    calls, kill = spilling
    before = calls.load()
    try:
        CacheHistory(calls, kill, seed).run()
    except Exception as error:
        raise AssertionError(f"python -m tests.support.cache_history {seed} --spill") from error
    after = calls.load()
    assert after.spill.spilled_pages > before.spill.spilled_pages
    assert after.spill.restored_pages > before.spill.restored_pages
    assert after.device.evicted_pages > before.device.evicted_pages
    wait_for(lambda: is_idle(calls.load()))
    wait_for(lambda: [ledger.reserved_bytes for ledger in calls.load().ledgers] == [0, 0, 0, 0])


@pytest.fixture(scope="module")
def crowded():
    with RunningService(TWO_TILES) as running, Calls(running.address) as calls:
        calls.wait_health(1)
        yield calls, killer(running), stopper(running)


def test_a_second_tile_has_room_because_pages_move_and_nothing_is_evicted(crowded):
    calls, kill, stop = crowded
    history = CrowdedHistory(calls, kill, stop, 0, 2)
    before = calls.load().device
    history._do_crowd()
    after = calls.load().device
    # Two of the four extents with a page each are emptied: the second tile needs so much.
    assert after.moved_pages == before.moved_pages + 2
    assert after.evicted_pages == before.evicted_pages
    assert after.promoted_pages == before.promoted_pages + 17  # each page once
    wait_for(lambda: is_idle(calls.load()))
    assert (calls.ledger("hbm").reserved_bytes, calls.ledger("host").reserved_bytes) == (0, 0)


def test_every_answer_is_the_models_while_pages_move(crowded):
    before = crowded[0].load()
    history = CrowdedHistory(*crowded, CROWDED_SEED, CROWDED_STEPS)
    try:
        history.run()
    except Exception as error:
        raise AssertionError(f"python -m tests.support.crowded_history {CROWDED_SEED} {CROWDED_STEPS}") from error
    after = crowded[0].load()
    assert history.steps["crowd"] + history.steps["two_at_once"] > 3
    assert after.device.moved_pages > before.device.moved_pages
    assert after.worker_restarts > before.worker_restarts
    wait_for(lambda: is_idle(crowded[0].load()))
    assert (crowded[0].ledger("host").reserved_bytes, crowded[0].load().key_caches) == (0, 0)


def test_a_seed_is_the_same_history_every_time(service, connection):
    told: list[list[str]] = []
    for _ in range(2):
        lines: list[str] = []
        CacheHistory(connection, killer(service), 4711, tell=lines.append, steps=12).run()
        told.append(lines)
    assert told[0] == told[1]
    assert len(told[0]) > 8
