"""Evictions, promotions, spilling and dead workers cost no wrong answer: seeded histories against plain arrays.

A failure names its seed: python -m tests.support.cache_history SEED tells that history again, step by step, and with
--spill on a host that is too small as well.
"""

from __future__ import annotations

import pytest

from streamindex_service.testing.service import RunningService
from tests.support.cache_history import CacheHistory, killer
from tests.support.calls import Calls
from tests.support.services import SMALL_DEVICE, is_idle, small_host, wait_for

SEEDS = 4
SPILL_SEEDS = (3, 5, 7)  # those with much in them


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


def test_a_seed_is_the_same_history_every_time(service, connection):
    told: list[list[str]] = []
    for _ in range(2):
        lines: list[str] = []
        CacheHistory(connection, killer(service), 4711, tell=lines.append, steps=12).run()
        told.append(lines)
    assert told[0] == told[1]
    assert len(told[0]) > 8
