"""Both clients through the same scenarios, over a unix socket, against a service that fails on request."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import numpy as np
import pytest
import streamindex_client
from streamindex_client import BatchItem, CacheResidency, ClientOptions, RetryPolicy, errors

from tests.unit.test_client_fake import HEAD_DIM, HEADS, WORKER_LOST, FakeService, Fault, error, fake

__all__ = ["fake"]
OPTIONS = ClientOptions(chunk_bytes=4096, retry=RetryPolicy(initial_s=0.005, max_s=0.02, max_attempts=6))
PATIENT = ClientOptions(
    chunk_bytes=4096, reconnect_max_s=0.1, retry=RetryPolicy(initial_s=0.005, max_s=0.02, max_attempts=1 << 20)
)
UNAVAILABLE = error(grpc.StatusCode.UNAVAILABLE)
_END: Any = object()


class Awaited:
    """The blocking client behind awaitable methods, each in a thread."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if not callable(value) or name == "length":
            return value
        if name in ("search", "watch_load"):
            return lambda **arguments: Awaited(value(**arguments))

        async def call(*positional: Any, **named: Any) -> Any:
            result = await asyncio.to_thread(value, *positional, **named)
            return Awaited(result) if isinstance(result, streamindex_client.KeyCache) else result

        return call

    async def __aiter__(self) -> Any:
        while (part := await asyncio.to_thread(next, self.inner, _END)) is not _END:
            yield part


@pytest.fixture
def options() -> ClientOptions:
    return OPTIONS


@pytest.fixture(params=["sync", "async"])
async def client(request, fake: FakeService, options: ClientOptions):
    if request.param == "sync":
        with streamindex_client.connect(fake.address, options=options) as blocking:
            yield Awaited(blocking)
    else:
        async with streamindex_client.connect_async(fake.address, options=options) as asynchronous:
            yield asynchronous


@pytest.fixture
async def cache(client: Any) -> Any:
    return await client.create_key_cache(heads=HEADS, head_dim=HEAD_DIM, ratio=4, key_format="bf16", layers=2)


def keys(rows: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 60000, (rows, HEAD_DIM), np.uint16)


def queries(rows: int, start: int = 0) -> Any:
    q = np.arange(start, start + rows, dtype=np.uint16)[:, None, None] * np.ones((1, HEADS, HEAD_DIM), np.uint16)
    return q, np.arange(start, start + rows, dtype=np.float32)[:, None] * np.ones((1, HEADS), np.float32)


def check(result: Any, rows: int, start_position: int = 0) -> None:
    assert result.indices.shape == (rows, 4)
    assert result.indices[:, 0].tolist() == list(range(start_position, start_position + rows))
    assert result.indices[:, 1].tolist() == list(range(rows))
    assert (result.indices[:, 2:] == -1).all()


# --- uploads ---


async def test_upload(fake, cache):
    told = []
    rows = keys(1000)
    length = await cache.append(layer=1, keys=rows, progress=lambda done, total: told.append((done, total)))
    assert length == cache.length(1) == 1000
    assert fake.layers[1] == rows.tobytes()
    assert told[0] == (0, 1000)
    assert told[-1] == (1000, 1000)
    assert told == sorted(told)
    assert await cache.append(layer=1, keys=keys(10, 1)) == 1010  # at the layer's length
    assert fake.layers[1] == rows.tobytes() + keys(10, 1).tobytes()
    assert await cache.append(layer=1, keys=keys(0)) == 1010
    assert await cache.append(layer=1, keys=keys(5, 2), first_row=1000) == 1010


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(after=0, error=WORKER_LOST)],
        [Fault(after=3, error=WORKER_LOST), Fault(after=2, error=WORKER_LOST)],
        [Fault(after=3, error=UNAVAILABLE, bare=True)],
        [Fault(after=3, error=WORKER_LOST, in_band=True)],
        [Fault(after=3, error=error(grpc.StatusCode.RESOURCE_EXHAUSTED, "HOST_MEMORY", 5), in_band=True)],
    ],
)
async def test_a_broken_upload_is_resumed_and_no_row_travels_twice(fake, cache, faults):
    fake.faults["AppendKeys"] = faults
    rows = keys(1500)
    assert await cache.append(layer=0, keys=rows, first_row=0) == 1500
    assert fake.layers[0] == rows.tobytes()
    offsets = [start for start, _ in fake.chunk_rows]
    assert offsets == sorted(set(offsets))
    assert len(fake.uploads) == 1


@pytest.mark.parametrize("options", [PATIENT], ids=["patient"])
async def test_a_server_that_goes_away_and_comes_back(fake, cache):
    def restart(stopped: threading.Event) -> None:
        assert stopped.wait(30)
        fake.start()

    def go_away() -> None:
        restarting.append(threading.Thread(target=restart, args=(fake.server.stop(0),)))  # takes no call from here on
        restarting[0].start()

    restarting: list[threading.Thread] = []
    fake.faults["AppendKeys"] = [Fault(after=3, error=UNAVAILABLE, bare=True, hook=go_away)]
    rows = keys(1500)
    try:
        assert await cache.append(layer=0, keys=rows, first_row=0) == 1500
    finally:
        await asyncio.to_thread(restarting[0].join)
    assert fake.layers[0] == rows.tobytes()


async def test_a_commit_whose_answer_was_lost(fake, cache):
    fake.faults["AppendKeys"] = [Fault(lose_end=True, error=UNAVAILABLE)]
    assert await cache.append(layer=0, keys=keys(300), first_row=0) == 300
    assert len(fake.uploads) == 1
    assert sum(count for _, count in fake.chunk_rows) == 300


async def test_a_refused_upload_carries_its_details(fake, cache):
    refusal = error(grpc.StatusCode.INVALID_ARGUMENT, "NON_FINITE", tensor="keys", row="7")
    fake.faults["AppendKeys"] = [Fault(after=2, error=refusal, in_band=True)]
    with pytest.raises(errors.NonFiniteError) as caught:
        await cache.append(layer=0, keys=keys(900), first_row=0)
    assert caught.value.metadata["row"] == "7"
    upload_id = caught.value.metadata["upload_id"]
    assert len(fake.uploads) == 1  # never tried again
    assert fake.uploads[upload_id].rows == 256


async def test_an_upload_resumed_by_another_handle(fake, client, cache):
    fake.faults["AppendKeys"] = [Fault(after=2, error=error(grpc.StatusCode.INTERNAL))]
    with pytest.raises(errors.InternalError) as caught:
        await cache.append(layer=0, keys=keys(900), first_row=0)
    upload_id = caught.value.metadata["upload_id"]
    state = await client.query_upload(upload_id)
    assert (state.row_offset, state.committed) == (256, False)
    again = await client.open_key_cache(cache.id)
    assert await again.append(layer=0, keys=keys(900), resume_upload_id=upload_id) == 900
    assert fake.layers[0] == keys(900).tobytes()


async def test_scales_travel_with_fp8_keys(fake, client):
    cache = await client.create_key_cache(heads=HEADS, head_dim=HEAD_DIM, ratio=1, key_format="fp8_e4m3", layers=1)
    rows, scales = keys(500).astype(np.uint8), np.linspace(0, 1, 500, dtype=np.float32)
    fake.faults["AppendKeys"] = [Fault(after=1, error=WORKER_LOST)]
    assert await cache.append(layer=0, keys=rows, scales=scales) == 500
    (upload,) = fake.uploads.values()
    assert bytes(upload.scales) == scales.tobytes()


# --- searches ---


async def test_search(fake, cache):
    q, w = queries(500)
    result = await cache.search_all(layer=0, q=q, w=w, top_k=4, start_position=70, want_scores=True)
    check(result, 500, 70)
    assert result.scores[:, 0].tolist() == w[:, 0].tolist()
    assert (result.summary.implementation, result.summary.rows, result.summary.attempts) == ("fake", 500, 1)


async def test_parts_come_in_order(cache):
    q, w = queries(300)
    row = 0
    async for part in cache.search(layer=0, q=q, w=w, top_k=4, start_position=0):
        assert part.row_offset == row
        assert part.scores is None
        row += part.rows
    assert row == 300


async def test_no_queries(cache):
    q, w = queries(0)
    result = await cache.search_all(layer=0, q=q, w=w, top_k=4, start_position=0, want_scores=True)
    assert result.indices.shape == result.scores.shape == (0, 4)
    assert (await cache.search_all(layer=0, q=iter(()), top_k=4, start_position=0)).indices.shape == (0, 4)


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(after=0, error=WORKER_LOST), Fault(after=4, error=UNAVAILABLE, bare=True)],
        [Fault(after=3, corrupt=True)],
        [Fault(error=error(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 5), in_band=True)],
        [Fault(lose_end=True, error=UNAVAILABLE)],
    ],
)
@pytest.mark.parametrize("form", ["tensor", "positions", "chunks"])
async def test_a_broken_search_is_asked_again_from_the_first_unanswered_row(fake, cache, faults, form):
    fake.faults["Search"] = list(faults)
    q, w = queries(500)
    positions = np.arange(30, 530)
    if form == "tensor":
        arguments = {"q": q, "w": w, "start_position": 30}
    elif form == "positions":
        arguments = {"q": q, "w": w, "positions": positions}
    else:
        cuts = [slice(0, 130), slice(130, 131), slice(131, 131), slice(131, 400), slice(400, 500)]
        arguments = {"q": ((q[cut], w[cut], positions[cut]) for cut in cuts)}
    check(await cache.search_all(layer=0, top_k=4, **arguments), 500, 30)
    assert len({header.request_key for header in fake.search_headers}) == 1


async def test_answers_come_while_queries_are_still_being_made(cache):
    answered = threading.Event()

    def chunks() -> Any:
        yield queries(10)
        assert answered.wait(10), "the first answer has to come before the second chunk is made"
        yield queries(10, 10)

    async def async_chunks() -> Any:
        yield queries(10)
        while not answered.is_set():  # noqa: ASYNC110 - set by the same loop's consumer, or by a thread
            await asyncio.sleep(0.001)
        yield queries(10, 10)

    source = chunks() if isinstance(cache, Awaited) else async_chunks()
    rows = 0
    async for part in cache.search(layer=0, q=source, top_k=4, start_position=0):
        assert part.indices[0, 1] == rows
        rows += part.rows
        answered.set()
    assert rows == 20


async def test_a_slow_reader_slows_the_sender(request, fake):
    options = ClientOptions(chunk_bytes=1024, search_window_rows=64, retry=OPTIONS.retry)
    made = 0

    def chunks() -> Any:
        nonlocal made
        while True:
            made += 20
            yield queries(20)

    def look_sync() -> None:
        with streamindex_client.connect(fake.address, options=options) as client:
            cache = client.create_key_cache(heads=HEADS, head_dim=HEAD_DIM, ratio=4, key_format="bf16", layers=2)
            with cache.search(layer=0, q=chunks(), top_k=4, start_position=0) as stream:
                seen = sum(next(stream).rows for _ in range(5))
                threading.Event().wait(0.3)
                assert made <= seen + 64 + 40

    await asyncio.to_thread(look_sync)
    made = 0
    async with streamindex_client.connect_async(fake.address, options=options) as client:
        cache = await client.create_key_cache(heads=HEADS, head_dim=HEAD_DIM, ratio=4, key_format="bf16", layers=2)
        async with cache.search(layer=0, q=chunks(), top_k=4, start_position=0) as stream:
            seen = 0
            for _ in range(5):
                seen += (await anext(stream)).rows
            await asyncio.sleep(0.3)
            assert made <= seen + 64 + 40


async def test_a_search_that_is_left_ends_on_the_server(fake, cache):
    def forever() -> Any:
        while True:
            yield queries(5)

    stream = cache.search(layer=0, q=forever(), top_k=4, start_position=0)
    async for _ in stream:
        break
    await stream.close()
    for _ in range(100):
        before = fake.rows_received
        await asyncio.sleep(0.02)
        if fake.rows_received == before:
            return
    raise AssertionError("rows still arrive")


async def test_what_the_iterator_raises_reaches_the_caller(fake, cache):
    def broken() -> Any:
        yield queries(10)
        raise LookupError("the caller's own")

    with pytest.raises(LookupError, match="the caller's own"):
        await cache.search_all(layer=0, q=broken(), top_k=4, start_position=0)
    with pytest.raises(errors.InputError, match="w: has shape"):
        await cache.search_all(layer=0, q=iter([(queries(10)[0], queries(9)[1])]), top_k=4, start_position=0)
    with pytest.raises(errors.InputError, match="q: has shape"):
        await cache.search_all(layer=0, q=keys(4), w=queries(4)[1], top_k=4, start_position=0)
    assert len(fake.search_headers) <= 2  # nothing is asked again for the caller's mistakes


@pytest.mark.parametrize("in_band", [False, True])
async def test_refusals_that_are_never_retried(fake, cache, in_band):
    poison = error(grpc.StatusCode.FAILED_PRECONDITION, "POISON", 5)
    mismatch = error(grpc.StatusCode.FAILED_PRECONDITION, "CONVENTION_MISMATCH")
    missing = error(grpc.StatusCode.NOT_FOUND, "CACHE_NOT_FOUND")
    q, w = queries(30)
    kinds = [errors.PoisonError, errors.ConventionMismatchError, errors.NotFoundError]
    for refusal, kind in zip([poison, mismatch, missing], kinds, strict=True):
        fake.faults["Search"] = [Fault(error=refusal, in_band=in_band)]
        fake.search_headers.clear()
        with pytest.raises(kind) as caught:
            await cache.search_all(layer=0, q=q, w=w, top_k=4, start_position=0)
        assert caught.value.reason == refusal.reason
        assert len(fake.search_headers) == 1


async def test_attempts_are_bounded(fake, cache):
    fake.faults["Search"] = [Fault(error=WORKER_LOST) for _ in range(20)]
    q, w = queries(30)
    with pytest.raises(errors.WorkerLostError) as caught:
        await cache.search_all(layer=0, q=q, w=w, top_k=4, start_position=0)
    assert caught.value.retry_after_s == 0.005
    assert len(caught.value.request_id) == 32
    assert len(fake.search_headers) == OPTIONS.retry.max_attempts


async def test_the_deadline_holds_for_all_attempts(fake, cache):
    slow = error(grpc.StatusCode.UNAVAILABLE, "WORKER_LOST", 1800)
    fake.faults["Search"] = [Fault(error=slow) for _ in range(20)]
    q, w = queries(30)
    with pytest.raises(errors.DeadlineError) as caught:
        await cache.search_all(layer=0, q=q, w=w, top_k=4, start_position=0, timeout=2.0)  # for an attempt, not for two
    assert isinstance(caught.value.__cause__, errors.WorkerLostError)
    fake.faults["GetKeyCache"] = [Fault(hook=lambda: threading.Event().wait(0.5))]
    with pytest.raises(errors.DeadlineError):
        await cache.refresh(timeout=0.1)


# --- the rest ---


async def test_unary_calls(fake, client, cache):
    assert [each.id for each in await client.list_key_caches()] == ["cache-1", "cache-1"]  # two pages
    await cache.append(layer=0, keys=keys(100))
    await cache.append(layer=1, keys=keys(100))
    await cache.truncate(60, layer=1)
    assert (cache.length(0), cache.length(1)) == (100, 60)
    await cache.truncate(50)
    assert cache.info.layer_keys == (50, 50)
    assert (await cache.fork(keys=10)).id == "cache-1"
    assert (await cache.refresh()).spec.key_format == "bf16"
    load = await client.load()
    assert load.ready
    assert load.ledgers["hbm"].limit_bytes == 9
    assert load.residency == CacheResidency(device=1, partial=2, none=3, spilled=4)
    known = await client.capabilities()
    assert known.key_formats == ("bf16", "fp16")
    assert known.implementations[0].key_formats == ("bf16",)
    assert known.limits["max_top_k"] == 4096
    await cache.delete()
    assert cache.id not in repr(cache) or len(cache.id) <= 4


async def test_unary_calls_are_retried(fake, client, cache):
    fake.faults["GetLoad"] = [Fault(error=WORKER_LOST), Fault(error=UNAVAILABLE, bare=True)]
    assert (await client.load()).uptime_ms == 7
    fake.faults["GetLoad"] = [Fault(error=UNAVAILABLE) for _ in range(20)]
    with pytest.raises(errors.UnavailableError):
        await client.load()


async def test_what_is_not_idempotent_is_retried_only_when_offered(fake, client, cache):
    made = [name for name, _ in fake.calls].count("CreateKeyCache")
    spec = {"heads": 2, "head_dim": 16, "ratio": 1, "key_format": "fp16", "layers": 1}
    fake.faults["CreateKeyCache"] = [Fault(error=UNAVAILABLE, lose_end=True)]
    with pytest.raises(errors.UnavailableError):
        await client.create_key_cache(**spec)
    assert [name for name, _ in fake.calls].count("CreateKeyCache") == made + 1
    fake.faults["CreateKeyCache"] = [Fault(error=error(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY", 5))]
    assert (await client.create_key_cache(**spec)).info.spec.key_format == "fp16"


async def test_a_delete_whose_answer_was_lost(fake, cache):
    missing = error(grpc.StatusCode.NOT_FOUND, "CACHE_NOT_FOUND")
    fake.faults["DeleteKeyCache"] = [Fault(error=UNAVAILABLE, lose_end=True), Fault(error=missing)]
    await cache.delete()
    fake.faults["DeleteKeyCache"] = [Fault(error=missing)]
    with pytest.raises(errors.NotFoundError):
        await cache.delete()


async def test_a_batch(fake, client, cache):
    await cache.append(layer=0, keys=keys(10))
    q, w = queries(2)
    items = [
        BatchItem(cache_of(cache), 0, q, w, start_position=40, keys=keys(2)),
        BatchItem(cache_of(cache), 1, q, w, positions=[3, 5]),
        BatchItem(cache_of(cache), 0, keys=keys(1), first_row=12),
    ]
    first, second, third = await client.search_batch(items, top_k=4, want_scores=True)
    assert first.indices[:, :2].tolist() == [[40, 0], [41, 1]]
    assert first.scores[:, 0].tolist() == [0, 1]
    assert isinstance(second.error, errors.NotFoundError)
    assert second.indices is None
    assert third.indices.shape == (0, 4)
    assert cache.length(0) == third.layer_keys == 13
    await client.search_batch(items[:1], top_k=4, priority="batch")
    assert [request.priority for name, request in fake.calls if name == "SearchBatch"] == [0, 3]
    bad = BatchItem(cache_of(cache), 0, q, w)
    with pytest.raises(errors.InputError, match=r"items\[1\]\.positions: give either"):
        await client.search_batch([items[0], bad], top_k=4)


async def test_the_load_is_watched(fake, client):
    fake.faults["WatchLoad"] = [Fault(after=2, error=WORKER_LOST), Fault(error=UNAVAILABLE, bare=True)]
    loads = [load async for load in client.watch_load(interval_s=0.25)]  # until the server ends it in order
    assert [load.ledgers["hbm"].limit_bytes for load in loads] == [9] * (2 + 5)
    assert [request.interval_ms for name, request in fake.calls if name == "WatchLoad"] == [250] * 3
    for wrong in (0.05, 61):
        with pytest.raises(errors.InputError, match="interval_s"):
            client.watch_load(interval_s=wrong)
    fake.faults["WatchLoad"] = [Fault(after=1, corrupt=True)]
    with pytest.raises(errors.ProtocolError):
        _ = [load async for load in client.watch_load()]


async def test_wait_ready(fake, client):
    fake.faults["ready"] = [Fault()]
    with pytest.raises(errors.DeadlineError, match="not ready within"):
        await client.wait_ready(0.1)
    fake.faults["GetLoad"] = [Fault(error=UNAVAILABLE, bare=True), Fault(hook=fake.faults["ready"].clear)]
    await client.wait_ready(5)


async def test_no_server(tmp_path, client):
    fake_less = f"unix://{tmp_path}/nobody.sock"
    options = ClientOptions(retry=RetryPolicy(max_attempts=2, initial_s=0.001))
    with streamindex_client.connect(fake_less, options=options) as blocking, pytest.raises(errors.UnavailableError):
        blocking.load()
    async with streamindex_client.connect_async(fake_less, options=options) as asynchronous:
        with pytest.raises(errors.UnavailableError):
            await asynchronous.load()


async def test_a_closed_client(fake):
    blocking = streamindex_client.connect(fake.address, options=OPTIONS)
    blocking.close()
    with pytest.raises(errors.StreamIndexError):
        await asyncio.to_thread(blocking.load)
    asynchronous = streamindex_client.connect_async(fake.address, options=OPTIONS)
    await asynchronous.close()
    with pytest.raises(errors.StreamIndexError):
        await asynchronous.load()


def cache_of(cache: Any) -> Any:
    return cache.inner if isinstance(cache, Awaited) else cache


async def test_a_refusal_in_the_middle_of_sending_never_loses_its_details(fake, cache):
    refusal = error(grpc.StatusCode.INVALID_ARGUMENT, "NON_FINITE", row="7")
    rows = keys(5000)
    for attempt in range(20):
        fake.faults["AppendKeys"] = [Fault(after=attempt % 4, error=refusal, in_band=attempt % 2 == 0)]
        with pytest.raises(errors.NonFiniteError) as caught:
            await cache.append(layer=0, keys=rows, first_row=0)
        assert caught.value.metadata["row"] == "7"
