"""Messages that are built before gRPC asks for them: in order, few, and nothing is left of them."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import streamindex_client
from streamindex_client import ClientOptions, RetryPolicy, aio_driver, errors, sync_driver
from streamindex_client.aio_stream import AioStream
from streamindex_client.contract import APPEND_KEYS
from streamindex_client.effects import Open, Pause, Step
from streamindex_client.options import MESSAGES_AHEAD
from streamindex_client.sync_stream import SyncStream

from tests.unit.test_client_fake import HEAD_DIM, HEADS, WORKER_LOST, FakeService, Fault, error

PATIENCE_S = 30
CHUNK_BYTES = 1 << 17  # long enough for a thread; 4096 rows
OPTIONS = ClientOptions(chunk_bytes=CHUNK_BYTES, retry=RetryPolicy(initial_s=0.005, max_s=0.02))
SPEC = {"heads": HEADS, "head_dim": HEAD_DIM, "ratio": 4, "key_format": "bf16", "layers": 1}


def message(number: int) -> bytes:
    """A long one, so that it is built on a thread."""
    return str(number).encode().ljust(1 << 17)


class Numbered:
    """Steps that build `message(0)`, `message(1)`, ...; `stop` of them, or without end. `built` counts."""

    wants_input = False

    def __init__(self, stop: int | None = None, hook: Callable[[int], object] = lambda number: None) -> None:
        self.built = 0
        self._numbers = itertools.count() if stop is None else iter(range(stop))
        self._hook = hook

    def next_step(self) -> Step:
        number = next(self._numbers, None)
        return Pause.HALF_CLOSE if number is None else lambda: self._build(number)

    def _build(self, number: int) -> bytes:
        assert number == self.built, "messages are built in the order of their steps"
        self._hook(number)
        self.built += 1
        return message(number)

    def feed(self, block: Any) -> None:
        raise AssertionError(block)

    def end_input(self) -> None:
        raise AssertionError


class Call:
    """What both drivers ask of a call; messages go where the test lets them."""

    def __init__(self) -> None:
        self.is_cancelled = threading.Event()
        self.written: deque[bytes] = deque()
        self.may_write = asyncio.Semaphore(0)
        self.half_closed = False

    def cancel(self) -> None:
        self.is_cancelled.set()

    def done(self) -> bool:
        return self.is_cancelled.is_set()

    async def wait_for_connection(self) -> None:
        pass

    async def write(self, message: bytes) -> None:
        await self.may_write.acquire()
        self.written.append(message)

    async def done_writing(self) -> None:
        self.half_closed = True


class Driver:
    """A channel that never sends: `messages` is what gRPC would ask."""

    def __init__(self) -> None:
        self.call = Call()
        self.messages: Iterator[bytes] = iter(())

    def open(self, method: Any, messages: Iterator[bytes], timeout_s: float | None) -> tuple[Call, str]:
        self.messages = messages
        return self.call, "id"


def sync_stream(duplex: Any) -> tuple[SyncStream, Driver, Any]:
    driver: Any = Driver()
    run = sync_driver.Run(driver, (effect for effect in ()), None)
    stream = SyncStream(run, duplex)
    stream.start(driver, Open(APPEND_KEYS, duplex, None))
    return stream, driver, run


def aio_stream(duplex: Any) -> tuple[AioStream, Call, Any]:
    driver: Any = Driver()
    run = aio_driver.Run(driver, (effect for effect in ()), None)
    return AioStream(run, duplex, driver.call, "id"), driver.call, run


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - threads change it
            await asyncio.sleep(0.001)


async def stays(count: Callable[[], int], expected: int) -> None:
    """It comes to `expected`, and no further in a while."""
    await until(lambda: count() >= expected)
    await asyncio.sleep(0.05)
    assert count() == expected


@pytest.fixture
def fake(tmp_path):
    service = FakeService(f"unix://{tmp_path}/s.sock", max_chunk_bytes=CHUNK_BYTES, window_bytes=8 * CHUNK_BYTES)
    yield service
    service.stop()


def builders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamindex-build")]


@pytest.fixture(autouse=True)
async def no_builder_is_left() -> Any:
    yield
    await until(lambda: not builders())


# --- one stream ---


async def test_a_blocking_stream_builds_a_few_messages_ahead_and_no_more():
    duplex = Numbered()
    stream, driver, _ = sync_stream(duplex)
    for taken in range(5):
        await stays(lambda: duplex.built, taken + MESSAGES_AHEAD)
        assert next(driver.messages) == message(taken)
    stream.close()
    assert not builders()  # closing waits for it
    assert list(driver.messages) == []
    assert driver.call.is_cancelled.is_set()


async def test_an_asyncio_stream_builds_a_few_messages_ahead_and_no_more():
    duplex = Numbered()
    stream, call, _ = aio_stream(duplex)
    for written in range(5):
        await stays(lambda: duplex.built, written + 1 + MESSAGES_AHEAD)  # one is with gRPC
        call.may_write.release()
    await until(lambda: len(call.written) == 5)
    await stream.close()
    assert list(call.written) == [message(number) for number in range(5)]


async def test_all_messages_are_sent_before_the_half_close():
    stream, driver, _ = sync_stream(Numbered(7))
    assert list(driver.messages) == [message(number) for number in range(7)]
    stream.close()
    asynchronous, call, _ = aio_stream(Numbered(7))
    for _ in range(7):
        call.may_write.release()
    await until(lambda: call.half_closed)
    assert list(call.written) == [message(number) for number in range(7)]
    await asynchronous.close()


async def test_short_asyncio_messages_need_no_thread(fake):
    async with streamindex_client.connect_async(fake.address, options=OPTIONS) as client:
        cache = await client.create_key_cache(**SPEC)
        seen: list[str] = []
        appended = await cache.append(layer=0, keys=keys(500), progress=lambda done, total: seen.extend(builders()))
        assert (appended, seen) == (500, [])


async def test_a_message_that_cannot_be_built_ends_the_stream():
    def fail_at_3(number: int) -> None:
        if number == 3:
            raise LookupError("torn")

    stream, driver, run = sync_stream(Numbered(hook=fail_at_3))
    assert len(list(driver.messages)) <= 3  # ends by itself
    assert driver.call.is_cancelled.is_set()
    assert run.failed
    stream.close()
    asynchronous, call, run = aio_stream(Numbered(hook=fail_at_3))
    for _ in range(3):
        call.may_write.release()
    await until(call.is_cancelled.is_set)
    assert run.failed
    await asynchronous.close()


async def test_a_sender_that_breaks_ends_the_stream():
    broken = LookupError("no such word")

    async def write(message: bytes) -> None:
        raise broken

    driver: Any = Driver()
    driver.call.write = write
    run = aio_driver.Run(driver, (effect for effect in ()), None)
    stream = AioStream(run, Numbered(), driver.call, "id")
    await until(driver.call.is_cancelled.is_set)
    assert run._source_failure is broken
    await stream.close()


async def test_a_builder_that_is_cancelled_blames_nobody():
    stream, _, run = aio_stream(Numbered())
    await asyncio.sleep(0)  # it has begun
    await stream.close()
    assert not run.failed


async def test_closing_waits_for_the_message_that_is_being_built():
    building, go_on = threading.Event(), threading.Event()

    def wait_at_1(number: int) -> None:
        if number == 1:
            building.set()
            assert go_on.wait(PATIENCE_S)

    stream, _, _ = sync_stream(Numbered(hook=wait_at_1))
    assert building.wait(PATIENCE_S)
    closing = asyncio.create_task(asyncio.to_thread(stream.close))
    await asyncio.sleep(0.05)
    assert not closing.done()
    go_on.set()
    await closing
    building.clear()
    go_on.clear()
    asynchronous, _, _ = aio_stream(Numbered(hook=wait_at_1))
    await until(building.is_set)
    aclosing = asyncio.create_task(asynchronous.close())
    await asyncio.sleep(0.05)
    assert not aclosing.done()
    go_on.set()
    await aclosing


# --- whole operations ---


class Torn(np.ndarray):
    """Rows from 20,000 on cannot be read."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and (index.stop or 0) > 20_000:
            raise LookupError("the tensor is torn")
        return super().__getitem__(index)


def keys(rows: int) -> Any:
    return np.random.default_rng(rows).integers(0, 60000, (rows, HEAD_DIM), np.uint16)


async def each_client(fake: FakeService, work: Callable[[Any], Any]) -> None:
    """The same with both clients: `work` is given a function that appends to a new cache."""
    with streamindex_client.connect(fake.address, options=OPTIONS) as blocking:
        cache = blocking.create_key_cache(**SPEC)
        await work(lambda **arguments: asyncio.to_thread(cache.append, layer=0, first_row=0, **arguments))
    async with streamindex_client.connect_async(fake.address, options=OPTIONS) as asynchronous:
        other = await asynchronous.create_key_cache(**SPEC)
        await work(lambda **arguments: other.append(layer=0, first_row=0, **arguments))


async def test_what_a_tensor_raises_in_the_middle_reaches_the_caller(fake):
    async def work(append: Any) -> None:
        with pytest.raises(LookupError, match="the tensor is torn"):
            await append(keys=keys(60_000).view(Torn))

    await each_client(fake, work)


@pytest.mark.parametrize("after", [0, 1, 5, 11])
async def test_chunks_built_for_a_broken_stream_are_built_again_for_the_next(fake, after):
    async def work(append: Any) -> None:
        fake.faults["AppendKeys"] = [Fault(after=after, error=WORKER_LOST), Fault(after=1, error=WORKER_LOST)]
        rows = keys(50_000)
        assert await append(keys=rows) == 50_000  # the service compares the digest
        assert fake.layers[0] == rows.tobytes()
        assert sum(count for _, count in fake.chunk_rows) == 50_000
        fake.chunk_rows.clear()

    await each_client(fake, work)


async def test_a_refused_upload_leaves_no_thread(fake):
    async def work(append: Any) -> None:
        for after in range(3):
            fake.faults["AppendKeys"] = [Fault(after=after, error=error(grpc.StatusCode.INVALID_ARGUMENT))]
            with pytest.raises(errors.InvalidRequestError):
                await append(keys=keys(60_000))
            await until(lambda: not builders())

    await each_client(fake, work)


async def test_a_cancelled_append_leaves_no_thread(fake):
    async with streamindex_client.connect_async(fake.address, options=OPTIONS) as client:
        cache = await client.create_key_cache(**SPEC)
        gate = threading.Event()
        fake.faults["AppendKeys"] = [Fault(after=2, error=WORKER_LOST, hook=lambda: gate.wait(PATIENCE_S))]
        appending = asyncio.create_task(cache.append(layer=0, keys=keys(60_000), first_row=0))
        await until(lambda: len(fake.chunk_rows) >= 2)
        appending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await appending
        gate.set()


async def test_a_sender_that_breaks_reaches_the_caller(fake, monkeypatch):
    async def write(message: bytes) -> None:
        raise LookupError("no such word")

    monkeypatch.setattr(AioStream, "_writer", lambda self: write)
    async with streamindex_client.connect_async(fake.address, options=OPTIONS) as client:
        cache = await client.create_key_cache(**SPEC)
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(LookupError, match="no such word"):
                await cache.append(layer=0, keys=keys(500), first_row=0)


async def test_an_iterator_that_is_cancelled_reaches_the_caller(fake):
    chunk = np.ones((5, HEADS, HEAD_DIM), np.uint16), np.ones((5, HEADS), np.float32)

    async def asynchronous() -> Any:
        yield chunk
        raise asyncio.CancelledError

    def blocking() -> Any:
        yield chunk
        raise asyncio.CancelledError

    async with streamindex_client.connect_async(fake.address, options=OPTIONS) as client:
        cache = await client.create_key_cache(**SPEC)
        for chunks in (asynchronous, blocking):
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(RuntimeError, match="the iterator was cancelled"):
                    await cache.search_all(layer=0, q=chunks(), top_k=4, start_position=0)


async def test_a_cancelled_search_is_cancelled_in_the_iterator(fake):
    waiting, ended = asyncio.Event(), []

    async def chunks() -> Any:
        waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        yield

    async with streamindex_client.connect_async(fake.address, options=OPTIONS) as client:
        cache = await client.create_key_cache(**SPEC)
        searching = asyncio.create_task(cache.search_all(layer=0, q=chunks(), top_k=4, start_position=0))
        await waiting.wait()
        searching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await searching
        await until(lambda: ended == ["cancelled"])


async def test_an_iterator_that_blocks_does_not_hold_up_closing(fake):
    released = threading.Event()

    def chunks() -> Any:
        yield np.ones((5, HEADS, HEAD_DIM), np.uint16), np.ones((5, HEADS), np.float32)
        assert released.wait(PATIENCE_S)

    def search() -> None:
        with streamindex_client.connect(fake.address, options=OPTIONS) as client:
            cache = client.create_key_cache(**SPEC)
            with cache.search(layer=0, q=chunks(), top_k=4, start_position=0) as stream:
                next(stream)

    await asyncio.to_thread(search)
    assert len(builders()) == 1  # it is in the caller's iterator, and ends with that
    released.set()
