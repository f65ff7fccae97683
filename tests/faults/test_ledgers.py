"""The device ledger against what the worker is told to take and to give back, extent by extent and page by page."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from streamindex_service.ipc.supervisor import WorkerLink
from streamindex_service.worker.device import Device
from streamindex_service.worker.key_store import KeyStore
from tests.support.calls import Calls
from tests.support.inprocess import InProcessServer
from tests.support.ledgers import OnDevice, churn
from tests.support.services import ROOMY, SMALL_DEVICE, wait_for
from tests.support.tensors import BF16, FP8, Draw, Kind

KINDS = [Kind(heads=2, head_dim=64), Kind(heads=2, head_dim=96, key_format=FP8, ratio=4), Kind(heads=1, head_dim=32)]
SIZES = [1, 257, 3000, 9001]
assert KINDS[0].key_format == BF16


@pytest.fixture
def stores(monkeypatch):
    """A key store for each worker, that does what the worker is told about extents."""
    made: dict[WorkerLink, KeyStore] = {}
    send = WorkerLink.send

    def tell(link, message, fd=None):
        if link.alive:
            store = made.setdefault(link, KeyStore(Device(torch.device("cpu"), "cpu", 1 << 30)))
            kind = message.WhichOneof("message")
            if kind == "allocate_extent":
                extent = message.allocate_extent
                assert extent.extent_id not in store.extents._extents
                store.extents.allocate(extent.extent_id, extent.extent_bytes)
            elif kind == "free_extent":
                assert message.free_extent.extent_id in store.extents._extents
                store.extents.free(message.free_extent.extent_id)
        send(link, message, fd)

    monkeypatch.setattr(WorkerLink, "send", tell)
    return made


@pytest.mark.parametrize("settings", [ROOMY, SMALL_DEVICE], ids=["all fit", "evicted"])
def test_the_ledger_is_what_the_worker_holds(stores, settings):
    rests = []

    with InProcessServer(settings) as server, Calls(server.target) as calls:
        service = server.server.service

        def check() -> None:
            found = server.run(lambda: OnDevice.of(service, KINDS))
            store = stores[service.supervisor.link]
            assert found.extents == {number: extent.numel() for number, extent in store.extents._extents.items()}
            assert found.reserved_bytes == sum(found.extents.values())
            rests.append(found)

        churn(calls, KINDS, SIZES, check)
        assert any(found.pages for found in rests)
        assert (service.governor.residency.evicted_pages > 0) is (settings is SMALL_DEVICE)
        assert (rests[-1].reserved_bytes, rests[-1].extents, rests[-1].pages) == (0, {}, 0)
        assert service.host.reserved_bytes == service.ingress.reserved_bytes == 0

        kind, draw = KINDS[0], Draw(2)
        cache_id = calls.create(kind).id
        calls.upload(kind, cache_id, draw.keys(kind, 3000))
        calls.search(kind, cache_id, draw.queries(kind, 3, start_position=3000), 40)
        check()
        assert rests[-1].pages == 12
        first = service.supervisor.link
        os.kill(first.process.pid, signal.SIGKILL)
        wait_for(lambda: calls.load().worker_restarts == 1)
        calls.wait_health(1)
        check()
        assert service.supervisor.link is not first
        assert rests[-1].reserved_bytes == 0
        churn(calls, KINDS[:1], SIZES[-2:], check)
        calls.delete(cache_id)
        assert service.hbm.reserved_bytes == service.host.reserved_bytes == 0
