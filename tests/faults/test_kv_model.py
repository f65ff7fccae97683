"""What comes, goes and is cut costs no wrong attention: seeded histories of caches with KV rows against plain tensors.

A failure names its seed: python -m tests.support.kv_history SEED tells that history again, step by step, with --spill
on a host that is too small as well.
"""

from __future__ import annotations

import pytest
import streamindex_client

from streamindex_service.testing.service import RunningService
from tests.support.cache_history import killer
from tests.support.calls import Calls
from tests.support.kv_history import KvHistory, settings_of
from tests.support.services import is_idle, wait_for

SEEDS = (6, 9, 11)  # those with much in them
NEEDED = ("given", "found", "attended whole", "batch", "open", "rewrite", "fork")


@pytest.fixture(scope="module", params=[False, True], ids=["evicted", "spilled"])
def service(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("spill") if request.param else None
    with RunningService(settings_of(directory)) as running:
        yield running, request.param


@pytest.mark.parametrize("seed", SEEDS)
def test_every_answer_is_what_the_rows_say(service, seed):
    running, with_disk = service
    with Calls(running.address) as calls, streamindex_client.connect(running.address) as client:
        calls.wait_health(1)
        before = calls.load()
        history = KvHistory(client, killer(running), seed)
        try:
            history.run()
        except Exception as error:
            told = f"python -m tests.support.kv_history {seed}{' --spill' if with_disk else ''}"
            raise AssertionError(told) from error
        after = calls.load()
        # It was about something: pages had to go and come back, workers died, and calls saw what had changed since.
        assert after.device.evicted_pages > before.device.evicted_pages + 50
        assert after.device.promoted_pages > before.device.promoted_pages + 50
        assert after.worker_restarts > before.worker_restarts
        assert min(history.steps[name] for name in NEEDED) > 0
        if with_disk:
            assert after.spill.restored_pages > before.spill.restored_pages
        wait_for(lambda: is_idle(calls.load()))
        wait_for(lambda: [ledger.reserved_bytes for ledger in calls.load().ledgers] == [0] * len(after.ledgers))
