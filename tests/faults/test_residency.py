"""How many caches are on a device that is too small for them: what GetLoad, the metrics and the commands say."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
import streamindex_client
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from typer.testing import CliRunner

from streamindex_service import top
from streamindex_service.cli import app
from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls
from tests.support.http import free_port, request
from tests.support.services import SMALL_DEVICE, wait_for
from tests.support.tensors import Draw, Kind

KIND = Kind(heads=2, head_dim=64)  # a page has 32 KiB
TWO_LAYERS = Kind(heads=2, head_dim=64, layers=2)
KEYS_OF_A_MIB = 32 * 256
COUNTS = ("device", "partial", "none", "spilled")


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def service(port: int) -> Iterator[RunningService]:
    with RunningService({**SMALL_DEVICE, "metrics": {"port": port}}) as running:
        yield running


@pytest.fixture
def calls(service: RunningService) -> Iterator[Calls]:
    with Calls(service.address) as connection:
        connection.wait_health(1)
        yield connection
        for cache in connection.list().key_caches:
            connection.delete(cache.id)


def made(calls: Calls, keys: int, kind: Kind = KIND) -> str:
    cache_id = str(calls.create(kind).id)
    for layer in range(kind.layers):
        calls.upload(kind, cache_id, Draw(1).keys(kind, keys), layer=layer, chunk_rows=4096)
    return cache_id


def searched(calls: Calls, cache_id: str, kind: Kind = KIND, layer: int = 0) -> None:
    calls.search(kind, cache_id, Draw(2).queries(kind, 2, start_position=10**6), 8, layer=layer)


def counts(calls: Calls) -> dict[str, int]:
    """As GetLoad says; they must be what the caches say of themselves."""
    found = calls.load().residency
    said = {name: getattr(found, name) for name in COUNTS}
    recount: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    for cache in calls.list().key_caches:
        total = cache.host_bytes + cache.spilled_bytes
        recount["spilled"] += cache.spilled_bytes > 0
        if total:
            here = cache.resident_bytes
            recount["device" if here == total else "partial" if here else "none"] += 1
    assert said == recount
    return said


def test_caches_come_are_evicted_and_go(calls: Calls) -> None:
    calls.create(KIND)  # without rows: nowhere
    assert counts(calls) == {"device": 0, "partial": 0, "none": 0, "spilled": 0}
    caches = [made(calls, KEYS_OF_A_MIB) for _ in range(5)]
    assert counts(calls) == {"device": 0, "partial": 0, "none": 5, "spilled": 0}
    before = calls.load().device.evicted_pages
    searched(calls, caches[0])
    assert counts(calls) == {"device": 1, "partial": 0, "none": 4, "spilled": 0}
    for cache_id in caches[1:]:
        searched(calls, cache_id)
    found = counts(calls)
    assert calls.load().device.evicted_pages > before
    assert found["device"] >= 1
    assert found["none"] >= 2  # 3 MiB are for pages
    for cache_id in caches:
        calls.delete(cache_id)
    assert counts(calls) == {"device": 0, "partial": 0, "none": 0, "spilled": 0}


def test_a_cache_of_which_one_layer_is_searched(calls: Calls) -> None:
    cache_id = made(calls, 600, TWO_LAYERS)
    searched(calls, cache_id, TWO_LAYERS, layer=1)
    assert counts(calls) == {"device": 0, "partial": 1, "none": 0, "spilled": 0}
    searched(calls, cache_id, TWO_LAYERS, layer=0)
    assert counts(calls) == {"device": 1, "partial": 0, "none": 0, "spilled": 0}


def test_nothing_is_on_the_device_of_a_worker_that_died(service: RunningService, calls: Calls) -> None:
    searched(calls, made(calls, 600))
    assert counts(calls)["device"] == 1
    restarts = calls.load().worker_restarts
    (worker,) = service.worker_pids()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: calls.load().worker_restarts > restarts)
    calls.wait_health(1)
    assert counts(calls) == {"device": 0, "partial": 0, "none": 1, "spilled": 0}


def test_everybody_says_the_same(service: RunningService, calls: Calls, port: int) -> None:
    caches = [made(calls, 200) for _ in range(6)]  # a page each: no more are searched than one extent holds
    for cache_id in caches[:3]:
        searched(calls, cache_id)
    searched(calls, made(calls, 200, TWO_LAYERS), TWO_LAYERS)
    expected = {"device": 3, "partial": 1, "none": 3, "spilled": 0}
    assert counts(calls) == expected
    with streamindex_client.connect(service.address) as client:
        residency = client.load().residency
    assert residency == streamindex_client.CacheResidency(**expected)
    metrics = text_string_to_metric_families(request(port, "/metrics").body.decode())
    samples = {(each.name, *each.labels.values()): each.value for family in metrics for each in family.samples}
    for name in ("device", "partial", "none"):
        assert samples["streamindex_key_caches_with_rows", name] == expected[name]
    assert samples["streamindex_spilled_key_caches",] == 0
    shown = json.loads(request(port, "/status.json").body)["load"]["residency"]
    assert {name: int(shown.get(name, 0)) for name in COUNTS} == expected
    text = io.StringIO()
    top.watch([calls.load()], Console(file=text, width=120), "here")
    assert "3 · 1 · 3" in text.getvalue()
    told = CliRunner().invoke(app, ["load", "--address", service.address, "--json"])
    assert json.loads(told.stdout)["residency"] == expected
    told = CliRunner().invoke(app, ["load", "--address", service.address])
    assert re.search(r"key_caches: partial\s+1\b", told.stdout), told.stdout
