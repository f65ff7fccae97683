"""What the worker fails at, tries again or dies of: until it has said so, it has it, for its queue and its frontend."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from streamindex_service.ipc.running import RunningTiles
from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.worker import key_store
from streamindex_service.worker.__main__ import Worker
from streamindex_service.worker.commands import Command, Commands
from streamindex_service.worker.device import Device
from streamindex_service.worker.executor import DEVICE_FAILED_EXIT_CODE, Executor
from streamindex_service.worker.extents import Extents, MissingMemoryError
from streamindex_service.worker.promotions import MemoryRanges
from tests.support.core_world import VirtualClock

CPU = Device(torch.device("cpu"), "cpu", 1 << 30)
AHEAD_S, TILE_S = 0.001, 10.0


class _Gpu(Device):
    """A device that counts as a GPU and has its memory in the host's."""

    @property
    def is_cuda(self) -> bool:
        return True


class _Rig:
    """A worker on a CPU, of which only the thread that issues work runs: what is issued is never done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.worker, self.tiles, self.clock = Worker(theirs), RunningTiles.create(), VirtualClock()
        self.commands = self.worker._commands = Commands(AHEAD_S, self.clock)
        self.executor = self.worker._executor = Executor(
            CPU, "chunked", "chunked", self.worker._send, self.commands.finished, self.tiles
        )
        self.executor.finish()
        extents = self.executor.store.extents = Extents(_Gpu(torch.device("cpu"), "no gpu", 1 << 30))
        extents.allocate(1, 4096)
        extents.free(1)  # it is for whoever finds no memory
        monkeypatch.setattr(self.commands._changed, "wait", self.clock.advance)  # instead of waiting
        self._theirs, self._begun_s = theirs, self.clock()

    def waited_s(self) -> float:
        """How long tiles have been held back for the device."""
        return self.clock() - self._begun_s

    def put(self, *tile_ids: int) -> None:
        for tile_id in tile_ids:
            tile = pb.SearchTile(tile_id=tile_id, band=2, estimated_us=int(1e6 * TILE_S))
            self.commands.put(Command(pb.ToWorker(search_tile=tile)))

    def issue(self) -> int:
        """Carry out the next command; its tile."""
        taken = self.commands.take()
        assert taken is not None
        self.worker._try(taken[0].message, None)
        return taken[0].message.search_tile.tile_id

    def failures(self) -> list[tuple[int, int]]:
        found = []
        while True:
            try:
                failed = pb.FromWorker.FromString(self.ours.recv(1 << 16)).failed
            except BlockingIOError:
                return found
            found.append((failed.id, failed.kind))

    def close(self) -> None:
        self.ours.close()
        self._theirs.close()
        self.tiles.close()


@pytest.fixture
def rig(monkeypatch):
    made = _Rig(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def exits(monkeypatch):
    """Codes with which the process would have ended; the thread ends instead."""
    codes = []

    def end(code):
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    return codes


def searching(rig, monkeypatch, *outcomes):
    """Have tries of tiles end so, one after another; returns what is seen in each."""
    left, seen = list(outcomes), []

    def search(message, sequences):
        seen.append((message.tile_id, rig.tiles.oldest_first()))
        outcome = left.pop(0)
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(rig.executor, "_search_on_cpu", search)
    return seen


def test_a_tile_that_is_tried_again_counts_until_it_is_done(rig, monkeypatch):
    seen = searching(rig, monkeypatch, torch.OutOfMemoryError("none left"), None, None)
    rig.put(1, 2)
    assert rig.issue() == 1
    assert seen == [(1, [1]), (1, [1])]
    assert rig.tiles.oldest_first() == [1]
    assert rig.waited_s() == 0
    assert rig.issue() == 2  # not before the device is about to be done with the first
    assert rig.waited_s() == pytest.approx(TILE_S - AHEAD_S)
    assert rig.tiles.oldest_first() == [1, 2]
    assert rig.failures() == []


def test_a_tile_that_fails_for_good_makes_way(rig, monkeypatch):
    none_left = torch.OutOfMemoryError("none left")
    seen = searching(rig, monkeypatch, none_left, none_left, ValueError("a defect"), None)
    rig.put(1, 2, 3)
    assert [rig.issue() for _ in range(3)] == [1, 2, 3]
    assert rig.waited_s() == 0
    assert seen == [(1, [1]), (1, [1]), (2, [2]), (3, [3])]
    assert rig.failures() == [(1, pb.FAILURE_KIND_OUT_OF_MEMORY), (2, pb.FAILURE_KIND_INTERNAL)]
    assert rig.tiles.oldest_first() == [3]
    assert list(rig.executor._running) == [3]


def test_what_was_running_when_the_device_failed_stays_listed(rig, monkeypatch, exits):
    """It may be told by a tile that comes later; the frontend finds what was there first."""
    searching(rig, monkeypatch, None, torch.AcceleratorError("an illegal memory access"))
    rig.put(1, 2)
    rig.issue()
    with pytest.raises(SystemExit):
        rig.issue()
    assert rig.failures() == [(2, pb.FAILURE_KIND_DEVICE)]
    assert exits == [DEVICE_FAILED_EXIT_CODE]
    assert rig.tiles.oldest_first() == [1, 2]


def test_a_device_that_fails_while_a_tile_is_waited_for(rig, monkeypatch, exits):
    def wait(work):
        raise RuntimeError("an illegal memory access")

    searching(rig, monkeypatch, None, None)
    monkeypatch.setattr(rig.executor, "_wait", wait)
    rig.executor.search_tile(pb.SearchTile(tile_id=7))
    rig.executor.search_tile(pb.SearchTile(tile_id=5))
    with pytest.raises(SystemExit):
        rig.executor._report(rig.executor._issued)  # what the thread does that waits for the device
    assert rig.failures() == [(7, pb.FAILURE_KIND_DEVICE)]
    assert exits == [DEVICE_FAILED_EXIT_CODE]
    assert rig.tiles.oldest_first() == [7, 5]


def test_a_tile_that_is_done_is_listed_no_more_when_it_is_told(monkeypatch):
    tiles, told = RunningTiles.create(), []
    executor = Executor(
        CPU, "chunked", "chunked", lambda message: told.append((message, tiles.oldest_first())), running=tiles
    )
    monkeypatch.setattr(executor, "_search_on_cpu", lambda message, sequences: None)
    executor.search_tile(pb.SearchTile(tile_id=7))
    executor.load_pages(pb.LoadPages(operation_id=8, page_bytes=64))  # no tile: it is nobody's
    executor.finish()
    done = [listed for message, listed in told if message.HasField("tile_done")]
    assert done == [[]]
    assert all(8 not in listed for _, listed in told)
    assert len(told) == 2
    tiles.close()


@pytest.mark.parametrize("kinds", [{"key_format": 2}, {"kv_format": 1}])
def test_a_view_that_is_made_at_the_second_try_has_all_its_pages(rig, monkeypatch, kinds):
    """Once, those of the message that is tried again too."""
    store, page_bytes = rig.executor.store, 256 * 128
    store.extents.allocate(2, 8 * page_bytes)
    base = store.bytes_at(2, 0, 1).data_ptr()
    make, tries = key_store.ExtentPages, []

    def make_at_the_second_try(*arguments):
        tries.append(len(arguments[1]))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("none left")
        return make(*arguments)

    monkeypatch.setattr(key_store, "ExtentPages", make_at_the_second_try)
    parts = [[0, 2], [4], [6]]
    for part in parts:
        message = pb.DefineView(
            view_id=9, head_dim=64, length_keys=1000, complete=part is parts[-1], **kinds,
            extent_ids=[2] * len(part), extent_offsets=[page * page_bytes for page in part],
        )  # fmt: skip
        last = part is parts[-1]
        rig.worker._try(pb.ToWorker(define_views={"operation_id": 4 if last else 0, "views": [message]}), None)
    assert tries == [4, 4]
    assert rig.failures() == [(0, pb.FAILURE_KIND_UNSPECIFIED)]  # it is done
    found: MemoryRanges = store.memory_of(9)
    assert found.starts.tolist() == [base + page * page_bytes for part in parts for page in part]
    assert not store._partial


def test_a_message_of_which_one_view_cannot_be_made_changes_none(rig):
    """It comes again: a part of a long view would be there twice."""
    store = rig.executor.store
    store.extents.allocate(5, 1 << 20)
    fields = {"key_format": 2, "head_dim": 64, "extent_offsets": [0]}
    views = [
        pb.DefineView(view_id=7, length_keys=200, complete=True, extent_ids=[5], **fields),
        pb.DefineView(view_id=8, length_keys=500, complete=False, extent_ids=[5], **fields),
        pb.DefineView(view_id=9, length_keys=200, complete=True, extent_ids=[6], **fields),
    ]
    message = pb.ToWorker(define_views=pb.DefineViews(operation_id=4, views=views))
    rig.worker._try(message, None)
    assert rig.failures() == [(4, pb.FAILURE_KIND_OUT_OF_MEMORY)]
    assert not store._partial
    with pytest.raises(MissingMemoryError):
        store.view(7)
    store.extents.allocate(6, 1 << 20)
    rig.worker._try(message, None)
    rest = pb.DefineView(view_id=8, length_keys=500, complete=True, extent_ids=[6], **fields)
    rig.worker._try(pb.ToWorker(define_views=pb.DefineViews(operation_id=6, views=[rest])), None)
    assert [len(store.view(view_id).pages) for view_id in (7, 8, 9)] == [1, 2, 1]


def test_the_parts_of_a_view_that_could_not_be_made_go_with_it(rig):
    store = rig.executor.store
    for complete in (False, True):
        message = pb.DefineView(
            view_id=9, key_format=2, head_dim=64, length_keys=500, complete=complete, extent_ids=[3], extent_offsets=[0]
        )
        rig.worker._try(pb.ToWorker(define_views={"operation_id": 4 * complete, "views": [message]}), None)
    assert rig.failures() == [(4, pb.FAILURE_KIND_OUT_OF_MEMORY)]
    rig.worker._try(pb.ToWorker(drop_views=pb.DropViews(view_ids=[9])), None)
    assert not store._partial
