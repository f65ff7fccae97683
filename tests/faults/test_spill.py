"""Host memory with a disk behind it: idle caches go there and come back, and no fault of the disk costs a key."""

from __future__ import annotations

import errno
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from streamindex.v1 import search_pb2

from streamindex_service.core.caches import CACHE_RECORD_BYTES, LAYER_RECORD_BYTES
from streamindex_service.testing.service import RunningService, ServiceStartError
from tests.support.calls import Calls, batch_item, finish_message, key_chunks, search_header, start_message
from tests.support.inprocess import InProcessServer
from tests.support.services import wait_for
from tests.support.spilling import (
    HOST_BYTES,
    KIND,
    PAGE_BYTES,
    PAGE_KEYS,
    calls_that_leave_nothing,
    check,
    filled,
    settings,
    spill_all,
)
from tests.support.tensors import FP8, Draw, Kind, ModelCache, expected

SCALED = Kind(heads=2, head_dim=64, key_format=FP8, layers=2)
EXHAUSTED, DATA_LOSS = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DATA_LOSS


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with InProcessServer(settings(tmp_path_factory.mktemp("spill"))) as running:
        yield running


@pytest.fixture
def calls(server):
    with calls_that_leave_nothing(server) as connection:
        yield connection


@pytest.fixture
def room(server):
    return server.server.service.room


@pytest.mark.parametrize("kind", [KIND, SCALED], ids=["bf16", "fp8"])
def test_there_and_back_to_the_byte(server, calls, kind):
    cache_id, model = filled(calls, kind, 1000, seed=1)
    before = calls.get(cache_id)
    spill_all(server)
    gone = calls.get(cache_id)
    assert (gone.host_bytes, gone.spilled_bytes) == (0, before.host_bytes)
    assert calls.ledger("spill").reserved_bytes >= before.host_bytes
    assert calls.ledger("host").reserved_bytes == CACHE_RECORD_BYTES + kind.layers * LAYER_RECORD_BYTES
    for layer in range(kind.layers):
        check(calls, kind, cache_id, model, layer)
    back = calls.get(cache_id)
    assert (back.host_bytes, back.spilled_bytes) == (before.host_bytes, 0)
    assert calls.ledger("spill").reserved_bytes == 0
    calls.delete(cache_id)


def test_a_search_brings_its_layer_and_no_other(server, calls):
    cache_id, model = filled(calls, SCALED, 1000, seed=2)
    spill_all(server)
    check(calls, SCALED, cache_id, model, layer=1)
    found = calls.get(cache_id)
    assert found.host_bytes == found.spilled_bytes > 0
    calls.delete(cache_id)


def test_load_counts_the_caches_on_disk(server, calls):
    made = [filled(calls, SCALED, 1000, seed) for seed in range(3)]
    assert calls.load().residency.spilled == 0
    spill_all(server)
    cache_id, model = made[0]
    residency = calls.load().residency
    assert (residency.device, residency.partial, residency.none, residency.spilled) == (0, 0, 3, 3)
    check(calls, SCALED, cache_id, model, layer=0)
    residency = calls.load().residency  # its other layer is still there
    assert (residency.device, residency.partial, residency.none, residency.spilled) == (0, 1, 2, 3)
    check(calls, SCALED, cache_id, model, layer=1)
    residency = calls.load().residency
    assert (residency.device, residency.partial, residency.none, residency.spilled) == (1, 0, 2, 2)
    for each, _ in made:
        calls.delete(each)
    assert calls.load().residency.spilled == 0


@pytest.mark.parametrize("first_row", [700, 690, 256, 0], ids=["append", "overlap", "edge", "rewrite"])
@pytest.mark.parametrize("way", ["stream", "batch"])
def test_writing_to_a_spilled_layer(server, calls, first_row, way):
    cache_id, model = filled(calls, KIND, 700, seed=3)
    spill_all(server)
    rows = Draw(4).keys(KIND, 60)
    model.write(0, first_row, rows)
    if way == "stream":
        calls.upload(KIND, cache_id, rows, first_row)
    else:
        request = search_pb2.SearchBatchRequest(items=[batch_item(KIND, cache_id, append=(first_row, rows))], top_k=1)
        (result,) = calls.searches.SearchBatch(request, timeout=60).results
        assert result.layer_keys == len(model.layers[0])
    assert calls.get(cache_id).spilled_bytes == 2 * PAGE_BYTES  # no more came back than was needed
    check(calls, KIND, cache_id, model)
    calls.delete(cache_id)


def test_forks_truncations_and_deletions_of_what_is_spilled(server, calls):
    cache_id, model = filled(calls, KIND, 900, seed=5)
    spill_all(server)
    fork, twin = calls.fork(cache_id, 800), model.fork(800)
    calls.truncate(cache_id, 500)
    model.truncate(500, None)
    assert calls.load().spill.restored_pages == (restored := calls.load().spill.restored_pages)
    assert (calls.get(cache_id).spilled_bytes, calls.get(fork.id).spilled_bytes) == (2 * PAGE_BYTES, 4 * PAGE_BYTES)
    check(calls, KIND, cache_id, model)
    assert calls.load().spill.restored_pages == restored + 2
    calls.delete(cache_id)
    check(calls, KIND, fork.id, twin)
    calls.delete(fork.id)


def test_more_than_the_host_holds(calls):
    """Five caches of 40 pages, where 128 fit: each upload and each search makes the room that it needs."""
    made = [filled(calls, KIND, 40 * PAGE_KEYS, seed) for seed in range(5)]
    for seed in (3, 0, 4, 1, 2, 0):
        check(calls, KIND, *made[seed], seed=seed)
    host = calls.ledger("host")
    assert host.peak_bytes <= host.limit_bytes == HOST_BYTES
    assert calls.load().spill.spilled_pages > 2 * 40
    assert sum(calls.get(cache_id).host_bytes for cache_id, _ in made) <= HOST_BYTES
    for cache_id, _ in made:
        calls.delete(cache_id)


def test_many_at_a_time(calls):
    """Searches of caches that do not fit together, from several threads; who finds no room is told to come again."""
    made = [filled(calls, KIND, 30 * PAGE_KEYS, seed) for seed in range(6)]

    def search(number):
        for turn in range(6):
            for _ in range(200):
                try:
                    check(calls, KIND, *made[(number + turn) % 6], seed=number)
                    break
                except grpc.RpcError as error:
                    if error.code() != EXHAUSTED:
                        raise
            else:
                raise AssertionError("never served")

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(search, number) for number in range(4)]:
            done.result()
    for cache_id, _ in made:
        calls.delete(cache_id)


@pytest.mark.parametrize("rows", [30, 100], ids=["some-fit-together", "each-alone"])
def test_a_batch_of_more_than_fits_together(server, calls, rows):
    """Its items are served after one another, and none is refused for what the others hold."""
    made = [filled(calls, KIND, rows * PAGE_KEYS, seed) for seed in range(6)]
    spill_all(server)
    queries = [Draw(seed).queries(KIND, 2, start_position=rows * PAGE_KEYS + 1) for seed in range(6)]
    items = [batch_item(KIND, cache_id, asked) for (cache_id, _), asked in zip(made, queries, strict=True)]
    request = search_pb2.SearchBatchRequest(items=items, top_k=100)
    for _ in range(3):
        results = calls.searches.SearchBatch(request, timeout=60).results
        for result, (_, model), asked in zip(results, made, queries, strict=True):
            assert not result.HasField("error"), result.error
            found = np.frombuffer(result.indices, np.int32).reshape(2, 100)
            assert np.array_equal(found, expected(KIND, model.layers[0], asked, 100)[0])
    for cache_id, _ in made:
        calls.delete(cache_id)


def test_a_search_that_is_open_keeps_its_layer(server, calls):
    cache_id, model = filled(calls, KIND, 600, seed=6)
    with calls.start_search(KIND, cache_id, 10):
        spill_all(server)
        assert calls.get(cache_id).spilled_bytes == 0
    wait_for(lambda: calls.load().running_searches == 0)
    spill_all(server)
    assert calls.get(cache_id).host_bytes == 0
    check(calls, KIND, cache_id, model)
    calls.delete(cache_id)


def test_a_worker_that_dies_takes_no_spilled_key(server, calls):
    cache_id, model = filled(calls, KIND, 600, seed=7)
    check(calls, KIND, cache_id, model)
    spill_all(server)
    link = server.run(lambda: server.server.service.supervisor.link)
    os.kill(link.process.pid, signal.SIGKILL)
    calls.wait_health(2)
    check(calls, KIND, cache_id, model)
    calls.delete(cache_id)


def test_what_has_expired_is_dropped_and_not_spilled(calls):
    spilled = calls.load().spill.spilled_pages
    idle, _ = filled(calls, KIND, 100 * PAGE_KEYS, seed=8, idle_ttl_s=1)
    wait_for(lambda: not any(cache.id == idle for cache in calls.list().key_caches))
    cache_id, model = filled(calls, KIND, 100 * PAGE_KEYS, seed=9)
    assert calls.load().spill.spilled_pages == spilled
    check(calls, KIND, cache_id, model)
    calls.delete(cache_id)


# Faults of the disk.


def broken(monkeypatch, name, code=errno.EIO):
    """A call of the system that fails, until the patch is taken back."""

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(f"streamindex_service.frontend.spill_files.os.{name}", fail)


@pytest.mark.parametrize(
    ("call", "code"),
    [("posix_fallocate", errno.ENOSPC), ("pwrite", errno.ENOSPC), ("pwrite", errno.EIO), ("fdatasync", errno.EIO)],
)
def test_a_disk_that_takes_nothing(calls, monkeypatch, call, code):
    cache_id, model = filled(calls, KIND, 100 * PAGE_KEYS, seed=10)
    other, rows = calls.create(KIND), Draw(11).keys(KIND, 60 * PAGE_KEYS)
    with monkeypatch.context() as patch:
        broken(patch, call, code)
        upload, accepted = calls.start_upload(other.id, len(rows))
        with upload:
            upload.send(*key_chunks(KIND, rows, 4 * PAGE_KEYS))
            refusal = upload.refusal()
        assert (refusal.code, refusal.error.reason) == (EXHAUSTED, "HOST_MEMORY")
        assert refusal.error.retry_after_ms
        assert calls.ledger("spill").reserved_bytes == calls.get(cache_id).spilled_bytes == 0
        check(calls, KIND, cache_id, model)
    held = calls.query_upload(accepted.upload_id).row_offset
    assert 0 < held < len(rows)

    def goes_on():
        """Once the pause after the failure is over."""
        again, state = calls.resume_upload(accepted.upload_id)
        with again:
            again.send(*key_chunks(KIND, rows, 4 * PAGE_KEYS, first=state.row_offset), finish_message(KIND, rows))
            messages, error = again.to_the_end()
        return error is None and messages[-1].committed.layer_keys == len(rows)

    wait_for(goes_on)
    copy = ModelCache(KIND)
    copy.write(0, 0, rows)
    check(calls, KIND, other.id, copy)
    check(calls, KIND, cache_id, model)
    for each in (cache_id, other.id):
        calls.delete(each)


def test_a_disk_budget_that_is_used_up(tmp_path):
    with (
        InProcessServer(settings(tmp_path, spill_bytes=10 * PAGE_BYTES)) as server,
        Calls(server.target) as calls,
    ):
        cache_id, model = filled(calls, KIND, 100 * PAGE_KEYS, seed=12)
        other, rows = calls.create(KIND), Draw(13).keys(KIND, 60 * PAGE_KEYS)
        upload, _ = calls.start_upload(other.id, len(rows))
        with upload:
            upload.send(*key_chunks(KIND, rows, 4 * PAGE_KEYS))
            refusal = upload.refusal()
        assert (refusal.code, refusal.error.reason) == (EXHAUSTED, "HOST_MEMORY")
        disk = calls.ledger("spill")
        assert disk.reserved_bytes == disk.limit_bytes == calls.get(cache_id).spilled_bytes == 10 * PAGE_BYTES
        calls.delete(other.id)
        check(calls, KIND, cache_id, model)


def damage(room):
    """One bit of every page on disk."""
    for fd in room.files._files.values():
        for offset in range(0, os.fstat(fd).st_size, PAGE_BYTES):
            (byte,) = os.pread(fd, 1, offset)
            os.pwrite(fd, bytes([byte ^ 1]), offset)


def test_bytes_that_are_not_those_that_went_are_never_served(server, calls, room):
    cache_id, model = filled(calls, KIND, 600, seed=14)
    kept, kept_model = filled(calls, KIND, 600, seed=15)
    spill_all(server)
    check(calls, KIND, kept, kept_model)
    damage(room)
    with calls.search_call() as call:
        call.send(search_header(KIND, cache_id, 5))
        refusal = call.refusal()
    assert (refusal.code, refusal.error.reason) == (DATA_LOSS, "SPILL_UNREADABLE")
    rows = Draw(1).keys(KIND, 1)
    items = [batch_item(KIND, cache_id, Draw(2).queries(KIND, 1)), batch_item(KIND, cache_id, append=(600, rows))]
    results = calls.searches.SearchBatch(search_pb2.SearchBatchRequest(items=items, top_k=5), timeout=60).results
    assert [result.error.reason for result in results] == ["SPILL_UNREADABLE"] * 2
    with calls.append_call() as call:
        call.send(start_message(cache_id, 1, first_row=600), *key_chunks(KIND, rows, 1), finish_message(KIND, rows))
        assert call.refusal().error.reason == "SPILL_UNREADABLE"
    check(calls, KIND, kept, kept_model)
    damage(room)  # the same bits again: now they are right
    check(calls, KIND, cache_id, model)
    for each in (cache_id, kept):
        calls.delete(each)


def test_a_read_that_fails_once_is_tried_again(server, calls, monkeypatch):
    cache_id, model = filled(calls, KIND, 600, seed=16)
    spill_all(server)
    preadv, failures = os.preadv, iter([True])

    def fail_once(*arguments):
        if next(failures, False):
            raise OSError(errno.EIO, "once")
        return preadv(*arguments)

    monkeypatch.setattr("streamindex_service.frontend.spill_files.os.preadv", fail_once)
    check(calls, KIND, cache_id, model)
    assert next(failures, None) is None
    calls.delete(cache_id)


def test_a_slow_disk_holds_up_nobody_else(server, calls, monkeypatch):
    cache_id, model = filled(calls, KIND, 600, seed=17)
    spill_all(server)
    kept, kept_model = filled(calls, KIND, 600, seed=18)
    preadv, reading, go_on = os.preadv, threading.Event(), threading.Event()

    def slow(*arguments):
        reading.set()
        assert go_on.wait(60)
        return preadv(*arguments)

    monkeypatch.setattr("streamindex_service.frontend.spill_files.os.preadv", slow)
    with ThreadPoolExecutor(1) as pool, calls.search_call() as gone:
        waiting = pool.submit(check, calls, KIND, cache_id, model)
        assert reading.wait(60)
        gone.send(search_header(KIND, cache_id, 5))
        check(calls, KIND, kept, kept_model)
        calls.upload(KIND, kept, Draw(1).keys(KIND, 10), first_row=600)
        gone.cancel()  # a caller who waits for the disk and goes leaves nothing behind
        assert not waiting.done()
        go_on.set()
        waiting.result()
    for each in (cache_id, kept):
        calls.delete(each)


def test_a_cache_deleted_while_its_keys_come_back(server, calls, monkeypatch):
    cache_id, _ = filled(calls, KIND, 600, seed=19)
    spill_all(server)
    preadv, reading, go_on = os.preadv, threading.Event(), threading.Event()

    def slow(*arguments):
        reading.set()
        assert go_on.wait(60)
        return preadv(*arguments)

    monkeypatch.setattr("streamindex_service.frontend.spill_files.os.preadv", slow)
    with calls.search_call() as call:
        call.send(search_header(KIND, cache_id, 5))
        assert reading.wait(60)
        calls.delete(cache_id)
        go_on.set()
        assert call.refusal().error.reason == "CACHE_NOT_FOUND"


def test_a_layer_that_host_memory_can_never_hold(calls):
    cache_id, model = filled(calls, KIND, 80 * PAGE_KEYS, seed=20)
    rows = Draw(21).keys(KIND, 80 * PAGE_KEYS)
    calls.upload(KIND, cache_id, rows, first_row=80 * PAGE_KEYS, chunk_rows=4096)
    with calls.search_call() as call:
        call.send(search_header(KIND, cache_id, 5))
        refusal = call.refusal()
    assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "EXCEEDS_BUDGET")
    assert refusal.error.metadata["needed_bytes"] == str(160 * PAGE_BYTES)
    calls.truncate(cache_id, 80 * PAGE_KEYS)
    check(calls, KIND, cache_id, model)
    calls.delete(cache_id)


# The process.


def test_a_frontend_that_is_killed_leaves_no_file(tmp_path):
    memory = {"spill_watermark": 0.5, "spill_idle_s": 0.05}
    with RunningService({**settings(tmp_path, **memory), "server": {"sweep_s": 0.1}}) as service:
        with Calls(service.address) as calls:
            cache_id, model = filled(calls, KIND, 90 * PAGE_KEYS, seed=22)
            # Ahead of need, and by itself; to ask for the cache would be to use it.
            wait_for(lambda: calls.load().spill.spilled_pages >= 20)
            check(calls, KIND, cache_id, model)
            wait_for(lambda: calls.load().spill.spilled_pages >= 40)
        names = [os.readlink(path) for path in Path(f"/proc/{service.process.pid}/fd").iterdir() if path.is_symlink()]
        assert sum(name.startswith(str(tmp_path)) and name.endswith("(deleted)") for name in names) > 0
        assert os.listdir(tmp_path) == []
        service.process.kill()
        service.process.wait()
        assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_used_is_said_at_the_start(tmp_path):
    with pytest.raises(ServiceStartError, match=r"memory\.spill_dir"), RunningService(settings(tmp_path / "absent")):
        raise AssertionError("it started")
