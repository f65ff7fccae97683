"""What the service does again and again goes on after a defect of ours, which is told of."""

from __future__ import annotations

import asyncio

import structlog

from streamindex_service.config import Settings
from streamindex_service.frontend.service import Service
from tests.support.services import ROOMY


async def test_what_failed_once_is_done_again():
    service = Service(Settings(**ROOMY), structlog.get_logger())
    tries, again = [], asyncio.Event()

    async def work() -> None:
        tries.append(len(tries))
        if len(tries) == 1:
            raise AssertionError("a defect")
        again.set()

    with structlog.testing.capture_logs() as told:
        watcher = asyncio.create_task(service._every(0.001, work))
        try:
            async with asyncio.timeout(20):
                await again.wait()
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            await service.stop()
    assert [(each["event"], each["watcher"]) for each in told] == [("watcher_failed", "work")]
