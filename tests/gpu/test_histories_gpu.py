"""What comes and goes on a real device costs no wrong answer: the seeded histories of tests/faults, whose pages move by
copies and streams of the device's own here."""

from __future__ import annotations

import pytest
import streamindex_client
import torch

from streamindex_service.testing.service import RunningService
from tests.support import cache_history
from tests.support.cache_history import FP32, CacheHistory, killer
from tests.support.calls import Calls
from tests.support.kv_history import KvHistory
from tests.support.services import MIB, SMALL_DEVICE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
SEED = 7
# the least in MiB that the largest tile of a history fits: the kernels' workspaces are larger than those on a CPU
BUDGETS = {"keys": 40, "rows": 56}


@pytest.mark.parametrize("kind", BUDGETS)
def test_every_answer_is_the_models(kind, monkeypatch):
    memory = {**SMALL_DEVICE["memory"], "device_budget_bytes": BUDGETS[kind] * MIB}
    settings = {**SMALL_DEVICE, "worker": {"device": "cuda:0"}, "memory": memory}
    # the kernels take no float32 keys
    kinds = tuple(each for each in cache_history.KINDS if each.key_format != FP32)
    monkeypatch.setattr(cache_history, "KINDS", 2 * kinds)
    with (
        RunningService(settings) as service,
        Calls(service.address) as calls,
        streamindex_client.connect(service.address) as client,
    ):
        calls.wait_health(1)
        if kind == "keys":
            CacheHistory(calls, killer(service), SEED).run()
        else:
            KvHistory(client, killer(service), SEED).run()
        load = calls.load()
    assert load.worker_restarts > 0
    assert load.device.evicted_pages > 50
    assert load.device.promoted_pages > 50
