"""The worker's executor on a CPU: what fails does not wear it out."""

from __future__ import annotations

import queue

import pytest
import torch

from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.worker.device import Device
from streamindex_service.worker.executor import MAX_IN_FLIGHT, Executor
from streamindex_service.worker.key_store import MissingMemoryError


@pytest.fixture
def sent():
    return queue.Queue()


@pytest.fixture
def executor(sent):
    made = Executor(Device(torch.device("cpu"), "cpu", 1 << 30), "chunked", sent.put)
    yield made
    made.finish()


def test_pages_that_cannot_be_copied_hold_no_place(executor, sent):
    """An extent that could not be allocated is not there; the copies to it fail, and later work still runs."""
    missing = pb.LoadPages(
        operation_id=1, page_bytes=64, segment_ids=[1], segment_offsets=[0], extent_ids=[1], extent_offsets=[0]
    )
    for _ in range(3 * MAX_IN_FLIGHT):
        with pytest.raises(MissingMemoryError):
            executor.load_pages(missing)
    assert executor.oldest_running_ms() == 0
    executor.load_pages(pb.LoadPages(operation_id=2, page_bytes=64))
    assert sent.get(timeout=20).operation_done.operation_id == 2


def test_tiles_of_a_view_that_is_not_there_hold_no_place(executor, sent):
    for tile in range(1, 3 * MAX_IN_FLIGHT):
        with pytest.raises(MissingMemoryError):
            executor.search_tile(pb.SearchTile(tile_id=tile, view_id=9))
    executor.load_pages(pb.LoadPages(operation_id=100, page_bytes=64))
    assert sent.get(timeout=20).operation_done.operation_id == 100


def test_cancelled_tiles_are_answered_and_forgotten(executor, sent):
    executor.cancel([3, 4])
    for tile in (3, 4):
        executor.search_tile(pb.SearchTile(tile_id=tile, view_id=9))
        failed = sent.get(timeout=20).failed
        assert (failed.id, failed.kind) == (tile, pb.FAILURE_KIND_CANCELLED)
    for tile in range(1, 1000):  # cancelled after they had started, as nearly all are
        executor.cancel([tile % 4 + 1])
    assert len(executor._cancelled) <= 4
