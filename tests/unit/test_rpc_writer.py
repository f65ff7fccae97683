"""Writes of a stream: one after another, and never longer than the caller may take to read."""

from __future__ import annotations

import asyncio

import pytest
from streamindex.v1 import search_pb2

from streamindex_service.errors import SlowConsumerError, UnauthenticatedError
from streamindex_service.frontend import interceptor, messages
from streamindex_service.frontend.interceptor import CallInterceptor
from streamindex_service.frontend.messages import MessageWriter
from streamindex_service.telemetry.counters import Counters


class Reader:
    """A peer whose transport takes messages only while it is open; like gRPC, it bears one write at a time."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.taken: list[str] = []
        self.writing = False

    async def write(self, message: str) -> None:
        assert not self.writing, "a second write beside one that has not ended"
        self.writing = True
        try:
            await self.open.wait()
            self.taken.append(message)
        finally:
            self.writing = False


async def test_a_reader_that_does_not_read_is_given_up():
    reader = Reader()
    writer = MessageWriter(reader, timeout_s=0.05)
    with pytest.raises(SlowConsumerError):
        await writer.write("accepted")
    with pytest.raises(SlowConsumerError):
        await writer.write("chunk")
    await writer.refuse("refused")  # nobody reads it, and nobody waits for it for ever
    assert reader.taken == []
    reader.open.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert reader.taken == ["accepted"]


async def test_a_write_that_was_given_up_by_its_task_is_not_overtaken():
    reader = Reader()
    writer = MessageWriter(reader, timeout_s=30.0)
    first = asyncio.create_task(writer.write("acknowledged"))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    second = asyncio.create_task(writer.write("committed"))
    await asyncio.sleep(0)
    reader.open.set()
    await second
    assert reader.taken == ["acknowledged", "committed"]


async def test_whoever_calls_without_credentials_and_does_not_read_holds_no_call(monkeypatch):
    monkeypatch.setattr(interceptor, "REFUSAL_TIMEOUT_S", 0.05)  # of the writer
    monkeypatch.setattr(messages, "REFUSAL_TIMEOUT_S", 0.05)  # of a refusal

    def nobody(context):
        raise UnauthenticatedError

    services = [search_pb2.DESCRIPTOR.services_by_name["SearchService"]]
    calls, reader = CallInterceptor(None, nobody, lambda: None, Counters(), services), Reader()
    async with asyncio.timeout(20):
        with pytest.raises(UnauthenticatedError):
            await calls._identified("/streamindex.v1.SearchService/Search", reader)
    assert reader.writing, "it was to be told"
