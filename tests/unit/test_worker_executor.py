"""The worker's executor on a CPU: what fails does not wear it out."""

from __future__ import annotations

import queue

import pytest
import torch

from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.worker.device import Device
from streamindex_service.worker.executor import Executor
from streamindex_service.worker.key_store import MissingMemoryError


@pytest.fixture
def sent():
    return queue.Queue()


@pytest.fixture
def finished():
    return []


@pytest.fixture
def executor(sent, finished):
    made = Executor(Device(torch.device("cpu"), "cpu", 1 << 30), "chunked", "chunked", sent.put, finished.append)
    yield made
    made.finish()


def test_pages_that_cannot_be_copied_hold_no_place(executor, sent):
    """An extent that could not be allocated is not there; the copies to it fail, and later work still runs."""
    missing = pb.LoadPages(
        operation_id=1, page_bytes=64, segment_ids=[1], segment_offsets=[0], extent_ids=[1], extent_offsets=[0]
    )
    for _ in range(20):
        with pytest.raises(MissingMemoryError):
            executor.load_pages(missing)
    assert executor.oldest_running_ms() == 0
    executor.load_pages(pb.LoadPages(operation_id=2, page_bytes=64))
    assert sent.get(timeout=20).operation_done.operation_id == 2


def test_tiles_of_a_view_that_is_not_there_hold_no_place(executor, sent, finished):
    for tile in range(1, 20):
        with pytest.raises(MissingMemoryError):
            executor.search_tile(pb.SearchTile(tile_id=tile, view_id=9))
    assert finished == list(range(1, 20))
    assert executor.oldest_running_ms() == 0
    executor.load_pages(pb.LoadPages(operation_id=100, page_bytes=64))
    assert sent.get(timeout=20).operation_done.operation_id == 100
