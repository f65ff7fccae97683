"""Reads of a stream: in the caller's task, and ended from outside with a reason."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from streamindex_service.errors import MalformedMessageError, SlowConsumerError
from streamindex_service.frontend.messages import Malformed, MessageReader


class Writer:
    """A peer that sends what is put."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue = asyncio.Queue()

    async def read(self):
        return await self.sent.get()


async def test_messages_come_in_order_up_to_the_end():
    writer = Writer()
    for message in ("one", "two", Malformed(ValueError()), grpc.aio.EOF):
        writer.sent.put_nowait(message)
    reader = MessageReader(writer)
    assert [await reader.next(), await reader.next()] == ["one", "two"]
    with pytest.raises(MalformedMessageError):
        await reader.next()
    assert await reader.next() is None
    assert not reader.waits


async def test_a_read_that_waits_is_ended_with_the_reason_and_its_task_goes_on():
    reader = MessageReader(Writer())
    silent = SlowConsumerError("nothing came")

    async def read():
        with pytest.raises(SlowConsumerError) as caught:
            await reader.next()
        assert caught.value is silent
        await asyncio.sleep(0)  # not cancelled any more
        return asyncio.current_task().cancelling()

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    assert reader.waits
    reader.stop(silent)
    assert await asyncio.wait_for(task, 10) == 0


async def test_a_cancelled_reader_is_cancelled_and_nobody_is_stopped_who_does_not_read():
    reader = MessageReader(Writer())
    reader.stop(SlowConsumerError("nobody reads"))
    task = asyncio.create_task(reader.next())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not reader.waits
