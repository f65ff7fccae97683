"""SparseAttendBatch through what goes wrong: workers that die, a device that is short, caches and callers that go."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
import streamindex_client
import torch
from streamindex_client import WorkerLostError
from streamindex_client.attend_batch import build_attend_batch

from streamindex_service.core.specs import RowKind
from streamindex_service.errors import DeviceMemoryError, HostMemoryError, InternalError
from streamindex_service.frontend.host_memory import SharedSegment
from streamindex_service.testing.service import RunningService, process_children
from tests.support.attend_batch import ASKED, Sequence
from tests.support.attention import Shape
from tests.support.calls import Calls
from tests.support.decoding import Decoding
from tests.support.inprocess import InProcessServer
from tests.support.services import ROOMY, SMALL_DEVICE, is_idle, small_host, wait_for

SHAPE = Shape()


@dataclass
class Step:
    """A decode step of some sequences on one service, and what it should give."""

    client: streamindex_client.Client
    calls: Calls
    sequences: list[Sequence]

    @classmethod
    def of(cls, target: str, sizes: list[tuple[int, int]]) -> Step:
        client = streamindex_client.connect(target)
        made = [Sequence(client, SHAPE, tokens, rows, seed) for seed, (tokens, rows) in enumerate(sizes)]
        return cls(client, Calls(target), made)

    @property
    def items(self) -> list[Any]:
        return [each.item() for each in self.sequences]

    def ask(self) -> list[Any]:
        return self.client.sparse_attend_batch(self.items, **ASKED)

    def begin(self) -> tuple[Any, Any]:
        """The call as a future, and how to read its answer."""
        others = {"sink": None, "want_indices": False, "priority": None}
        request = build_attend_batch(self.items, **ASKED, **others)
        return self.calls.attention.SparseAttendBatch.future(request.message, timeout=60), request.results

    def ledgers(self) -> dict[str, int]:
        return {ledger.name: ledger.reserved_bytes for ledger in self.calls.load().ledgers}

    def check(self, results: list[Any]) -> None:
        for sequence, result in zip(self.sequences, results, strict=True):
            sequence.check(result)

    def close(self) -> None:
        self.client.close()
        self.calls.close()


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with RunningService(ROOMY) as running:
        yield running


@pytest.fixture
def step(service) -> Iterator[Step]:
    made = Step.of(service.address, [(1901, 1), (40, 3), (700, 2), (2400, 5)])
    yield made
    for each in made.sequences:
        each.cache.delete()
    wait_for(lambda: is_idle(made.calls.load()))
    made.close()


@pytest.fixture
def frozen(service):
    """Stops the worker, and lets it go on at the end at the latest."""
    (worker,) = service.worker_pids()

    def freeze(stop: bool = True) -> None:
        os.kill(worker, signal.SIGSTOP if stop else signal.SIGCONT)

    yield freeze
    freeze(False)


@pytest.fixture(scope="module")
def killable() -> Iterator[tuple[InProcessServer, set[int]]]:
    """A server whose workers may die, and the processes that are not its workers."""
    others = set(process_children(os.getpid()))
    with InProcessServer(ROOMY) as server:
        yield server, others


@pytest.mark.parametrize("moment", ["while indices are found", "while rows attend"])
def test_a_worker_killed_in_the_middle_fails_items_that_can_be_asked_again(killable, moment, monkeypatch):
    server, others = killable
    (worker,) = set(process_children(os.getpid())) - others
    step = Step.of(server.target, [(1901, 1), (40, 3), (700, 2), (2400, 5)])
    step.ask()
    before, restarts = step.ledgers(), step.calls.load().worker_restarts
    device, killed = server.server.service.device, []
    submit = device.submit

    def kill_then_submit(views, block, request_key, message):
        attends = message(0).HasField("attend_tile")
        if not killed and attends == (moment == "while rows attend"):
            killed.append(worker)
            os.kill(worker, signal.SIGKILL)
        return submit(views, block, request_key, message)

    monkeypatch.setattr(device, "submit", kill_then_submit)
    results = step.ask()
    failed = [result.error for result in results if result.error is not None]
    assert len(failed) == 4 if moment == "while rows attend" else failed
    for error in failed:
        assert isinstance(error, WorkerLostError)
        assert error.retry_after_s is not None
    again = iter(
        step.client.sparse_attend_batch(
            [item for item, result in zip(step.items, results, strict=True) if result.error is not None], **ASKED
        )
    )
    step.check([next(again) if result.error is not None else result for result in results])
    assert step.calls.load().worker_restarts == restarts + 1
    wait_for(lambda: is_idle(step.calls.load()))
    assert step.ledgers() == before
    for each in step.sequences:
        each.cache.delete()
    step.close()


def test_a_step_that_appends_and_loses_its_worker_can_be_asked_again_as_it_is(killable, monkeypatch):
    """What it appended is there and is written again; the caches' own lengths were not noted."""
    server, others = killable
    (worker,) = set(process_children(os.getpid())) - others
    client = streamindex_client.connect(server.target)
    made = [Decoding(client, SHAPE, 300, held, held) for held in (255, 100)]
    steps = [each.step(count) for each, count in zip(made, (3, 8), strict=True)]
    items = [item for item, _ in steps]
    device = server.server.service.device
    submit = device.submit

    def kill_then_submit(views, block, request_key, message):
        if message(0).HasField("attend_tile"):
            os.kill(worker, signal.SIGKILL)
            monkeypatch.undo()
        return submit(views, block, request_key, message)

    monkeypatch.setattr(device, "submit", kill_then_submit)
    for result, (keys, window) in zip(client.sparse_attend_batch(items, **ASKED), ((64, 258), (27, 108)), strict=True):
        assert isinstance(result.error, WorkerLostError)
        assert (result.layer_keys, result.layer_kv_rows, result.layer_window_rows) == (keys, keys, window)
    assert [each.cache.window_length(0) for each in made] == [255, 100]
    results = client.sparse_attend_batch(items, **ASKED, want_indices=True)
    for each, (_, queries), result in zip(made, steps, results, strict=True):
        each.check(client, result, queries)
        each.cache.delete()
    client.close()


def test_an_append_that_finds_no_host_memory_fails_its_item_alone(inside, monkeypatch):
    uploads = inside.server.service.uploads
    client, hold = streamindex_client.connect(inside.target), uploads.hold
    made = [Decoding(client, SHAPE, 300, 255, seed) for seed in (1, 2, 3)]

    def short(upload, rows):
        if upload.kind is RowKind.KV and upload.cache.cache_id == made[1].cache.id:
            raise HostMemoryError("none left")
        hold(upload, rows)

    monkeypatch.setattr(uploads, "hold", short)
    steps = [each.step(9) for each in made]
    items = [item for item, _ in steps]
    failed = client.sparse_attend_batch(items, **ASKED)[1]
    assert (failed.error.reason, failed.error.field) == ("HOST_MEMORY", "appends[1]")
    assert failed.error.retry_after_s is not None
    assert (failed.layer_keys, failed.layer_kv_rows, failed.layer_window_rows) == (63, 63, 264)
    monkeypatch.undo()
    again = [replace(item, first_key=63, first_kv_row=63, first_window_row=255) for item in items]
    for each, (_, queries), result in zip(
        made, steps, client.sparse_attend_batch(again, **ASKED, want_indices=True), strict=True
    ):
        each.check(client, result, queries)
        each.cache.delete()
    assert uploads.open_uploads == 0
    client.close()


def test_a_cache_deleted_while_a_step_appends_is_not_found(inside, monkeypatch):
    """Its layers would look as if they had been truncated. What the others append is there, and counted."""
    service = inside.server.service
    client, make = streamindex_client.connect(inside.target), service.room.make
    made = [Decoding(client, SHAPE, 300, held, seed) for seed, held in enumerate((255, 190, 0, 100))]
    before = service.counters.upload_bytes

    async def make_while_others_delete(attempt):
        monkeypatch.setattr(service.room, "make", make)
        for each in made[1:3]:
            service.caches.delete(next(cache for cache in service.caches.by_use if cache.cache_id == each.cache.id))
        await asyncio.sleep(0)
        return await make(attempt)

    monkeypatch.setattr(service.room, "make", make_while_others_delete)
    steps = [each.step(9) for each in made]
    results = client.sparse_attend_batch([item for item, _ in steps], **ASKED, want_indices=True)
    for result in results[1:3]:
        assert (result.error.reason, result.error.field) == ("CACHE_NOT_FOUND", "key_cache_id")
        assert (result.layer_keys, result.layer_kv_rows, result.layer_window_rows) == (0, 0, 0)
    rows = (3 * (64 + 128) + 9 * 128) + (
        2 * (64 + 128) + 9 * 128
    )  # of the first and the last: keys, KV and window rows
    assert service.counters.upload_bytes - before == rows
    for number in (0, 3):
        made[number].check(client, results[number], steps[number][1])
        made[number].cache.delete()
    assert service.uploads.open_uploads == 0
    client.close()


def test_caches_of_a_step_do_not_expire_while_others_append(inside, monkeypatch):
    service = inside.server.service
    client, make = streamindex_client.connect(inside.target), service.room.make
    made = [Decoding(client, SHAPE, 300, 100, seed) for seed in (1, 2)]
    kept = []

    async def make_and_look(attempt):
        kept.append({cache.cache_id: cache.busy for cache in service.caches.by_use})
        return await make(attempt)

    monkeypatch.setattr(service.room, "make", make_and_look)
    steps = [each.step(1) for each in made]
    results = client.sparse_attend_batch([item for item, _ in steps], **ASKED, want_indices=True)
    assert kept
    for seen in kept:
        assert all(seen[each.cache.id] > 0 for each in made)
    monkeypatch.undo()
    for each, (_, queries), result in zip(made, steps, results, strict=True):
        each.check(client, result, queries)
        each.cache.delete()
    client.close()


def test_a_step_cancelled_while_its_appends_wait_leaves_no_row_and_no_upload(inside, monkeypatch):
    service = inside.server.service
    with Calls(inside.target) as calls, streamindex_client.connect(inside.target) as client:
        decoding = Decoding(client, SHAPE, 300, 255, 4)
        waiting, hold = threading.Event(), service.uploads.hold

        def full(upload, rows):
            waiting.set()
            raise HostMemoryError("none left")

        async def make(attempt):
            while True:  # as if something were spilled all the time
                try:
                    return attempt()
                except HostMemoryError:
                    await asyncio.sleep(0.01)

        monkeypatch.setattr(service.uploads, "hold", full)
        monkeypatch.setattr(service.room, "make", make)
        item, queries = decoding.step(9)
        request = build_attend_batch([item], **ASKED, sink=None, want_indices=True, priority=None).message
        future = calls.attention.SparseAttendBatch.future(request, timeout=60)
        assert waiting.wait(20)
        future.cancel()
        wait_for(lambda: service.uploads.open_uploads == 0)
        monkeypatch.setattr(service.uploads, "hold", hold)
        assert decoding.cache.refresh().layer_window_rows == (255,)
        decoding.check(client, client.sparse_attend_batch([item], **ASKED, want_indices=True)[0], queries)
        decoding.cache.delete()
        wait_for(lambda: is_idle(calls.load()))


def test_a_cancelled_batch_gives_everything_back(step, frozen):
    step.ask()
    before = step.ledgers()
    frozen()
    future, _ = step.begin()
    wait_for(lambda: step.calls.load().device.tiles > 0)
    future.cancel()
    frozen(False)
    wait_for(lambda: is_idle(step.calls.load()))
    assert step.ledgers() == before
    step.check(step.ask())


def test_a_deadline_ends_the_call_and_gives_everything_back(step, frozen):
    step.ask()
    before = step.ledgers()
    frozen()
    with pytest.raises(streamindex_client.DeadlineError):
        step.client.sparse_attend_batch(step.items, **ASKED, timeout=1.0)
    frozen(False)
    wait_for(lambda: is_idle(step.calls.load()))
    assert step.ledgers() == before


def test_caches_deleted_under_a_step_are_answered_and_then_gone(service, frozen):
    with Calls(service.address) as calls:
        wait_for(lambda: calls.load().key_caches == 0)
        before = {ledger.name: ledger.reserved_bytes for ledger in calls.load().ledgers}
    step = Step.of(service.address, [(1500, 1), (900, 2), (1200, 1)])
    right = [each.alone() for each in step.sequences]
    indices = [each.found() for each in step.sequences]
    frozen()
    future, read = step.begin()
    wait_for(lambda: step.calls.load().device.tiles > 0)
    for each in step.sequences:
        each.cache.delete()
    frozen(False)
    results = read(future.result(60))
    for sequence, result, alone, found in zip(step.sequences, results, right, indices, strict=True):
        sequence.check_right(result, found)
        assert torch.equal(result.out, alone.out)
    wait_for(lambda: is_idle(step.calls.load()))
    wait_for(lambda: step.ledgers() == before)
    step.close()


@pytest.fixture(scope="module")
def small_device() -> Iterator[RunningService]:
    with RunningService(SMALL_DEVICE) as running:
        yield running


def attend_twice(step: Step) -> None:
    """Right though pages come and go, within all budgets."""
    step.ask()
    step.check(step.ask())
    load = step.calls.load()
    assert load.device.evicted_pages > 0
    for ledger in load.ledgers:
        assert ledger.peak_bytes <= ledger.limit_bytes
    for each in step.sequences:
        each.cache.delete()
    wait_for(lambda: is_idle(step.calls.load()))
    step.close()


def test_more_rows_than_the_device_holds_are_attended_tile_by_tile(small_device):
    """KV rows of 3.8 MiB where 3 are free."""
    attend_twice(Step.of(small_device.address, [(24_000, 1 + seed % 2) for seed in range(5)]))


def test_what_finds_no_room_in_host_memory_beside_the_others_comes_after_them(tmp_path):
    """Rows of 16.6 MiB where the host holds 14."""
    with RunningService(small_host(tmp_path)) as service:
        step = Step.of(service.address, [(24_000, 1 + seed % 2) for seed in range(4)])
        wait_for(lambda: any(each.cache.refresh().spilled_bytes for each in step.sequences))
        attend_twice(step)


def test_keys_that_pass_through_the_device_in_windows_beside_keys_that_fit(small_device):
    """Of one sequence 4.4 MiB of index keys, where 3 MiB are free."""
    shape = Shape(key_dim=16, value_dim=16, heads=2, index_heads=2, index_dim=256, ratio=1)
    with streamindex_client.connect(small_device.address) as client:
        made = [Sequence(client, shape, tokens, 2, seed) for seed, tokens in enumerate((9000, 300, 2500))]
        results = client.sparse_attend_batch([each.item() for each in made], **ASKED)
        for sequence, result in zip(made, results, strict=True):
            sequence.check(result)
            sequence.cache.delete()


@pytest.fixture
def failing(inside, monkeypatch):
    """Tiles for which the device has no memory, by message and views; the list has the rows of tiles of attention."""
    device, tiles = inside.server.service.device, []
    submit = device.submit

    def without_memory(short, error=lambda: DeviceMemoryError("no memory")):
        def submit_or_fail(views, block, request_key, message):
            tile = message(0)
            if tile.HasField("attend_tile"):
                tiles.append([each.rows for each in tile.attend_tile.sequences])
            tile_id, future = submit(views, block, request_key, message)
            if not short(tile, views):
                return tile_id, future
            failed = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda _: failed.set_exception(error()))
            return tile_id, failed

        monkeypatch.setattr(device, "submit", submit_or_fail)
        return tiles

    yield without_memory
    monkeypatch.undo()


def test_a_tile_without_memory_runs_alone_then_in_pieces_across_sequences(inside, failing):
    step = Step.of(inside.target, [(300, 2), (200, 3), (400, 1), (250, 4)])
    tiles = failing(lambda tile, views: tile.attend_tile.rows > 3)
    results = step.ask()
    assert tiles == [[2, 3, 1, 4], [2, 3, 1, 4], [2, 1], [2, 1], [3], [1]]
    failing(lambda tile, views: False)
    step.check(results)
    wait_for(lambda: is_idle(step.calls.load()))
    for each in step.sequences:
        each.cache.delete()
    step.close()


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (lambda: DeviceMemoryError("no memory"), "DEVICE_MEMORY", grpc.StatusCode.RESOURCE_EXHAUSTED),
        (InternalError, "INTERNAL", grpc.StatusCode.INTERNAL),
    ],
    ids=["no-memory", "a-defect"],
)
def test_an_item_whose_indices_cannot_be_found_fails_alone(inside, failing, error, reason, code):
    step = Step.of(inside.target, [(300, 2), (200, 2), (400, 1), (250, 2)])
    third = []

    def short(tile, views):
        if not third:  # the tile of all four
            third.append(views[2].pages)
        return tile.HasField("search_tile") and any(view.pages is third[0] for view in views)

    tiles = failing(short, error)
    results = step.ask()
    assert tiles == [[2, 2], [2]]  # what lies between has no indices
    failing(lambda tile, views: False)
    for number, (sequence, result) in enumerate(zip(step.sequences, results, strict=True)):
        if number == 2:
            assert (result.error.reason, result.error.code) == (reason, code)
            assert bool(result.error.retry_after_s) == (reason == "DEVICE_MEMORY")
        else:
            sequence.check(result)
        sequence.cache.delete()
    wait_for(lambda: is_idle(step.calls.load()))
    step.close()


def test_what_fits_in_no_way_fails_the_items_and_the_worker_lives(inside, failing):
    step = Step.of(inside.target, [(300, 2), (200, 1)])
    restarts = step.calls.load().worker_restarts
    failing(lambda tile, views: tile.HasField("attend_tile"))
    assert [result.error.reason for result in step.ask()] == ["DEVICE_MEMORY"] * 2
    failing(lambda tile, views: False)
    step.check(step.ask())
    assert step.calls.load().worker_restarts == restarts
    for each in step.sequences:
        each.cache.delete()
    wait_for(lambda: is_idle(step.calls.load()))
    step.close()


def test_another_caller_s_cache_is_not_there(inside):
    step = Step.of(inside.target, [(300, 2), (200, 1)])
    request = build_attend_batch(step.items, **ASKED, sink=None, want_indices=False, priority=None)
    metadata = (("x-caller", "somebody else"),)
    answer = step.calls.attention.SparseAttendBatch(request.message, timeout=20, metadata=metadata)
    assert [result.error.reason for result in answer.results] == ["CACHE_NOT_FOUND"] * 2
    assert not any(result.out for result in answer.results)
    for each in step.sequences:
        each.cache.delete()
    step.close()


@pytest.mark.parametrize("sizes", [[(300, 2), (200, 1)], [(300, 2)]])
def test_a_step_for_which_the_host_has_no_memory_says_so_of_each_item(sizes, monkeypatch):
    """The rows find no block: each item is refused, may be asked again, and is right then."""
    with InProcessServer(ROOMY) as server:
        step = Step.of(server.target, sizes)
        try:
            step.check(step.ask())
            server.server.service.blocks._free.clear()
            create = SharedSegment.create.__func__

            def scarce(cls, size_bytes, *, writable_by_worker):
                if writable_by_worker:
                    raise OSError(errno.ENOMEM, "no memory")
                return create(cls, size_bytes, writable_by_worker=writable_by_worker)

            with monkeypatch.context() as patch:
                patch.setattr(SharedSegment, "create", classmethod(scarce))
                refused = step.ask()
            assert [result.error.reason for result in refused] == ["HOST_MEMORY"] * len(sizes)
            step.check(step.ask())
        finally:
            step.close()
