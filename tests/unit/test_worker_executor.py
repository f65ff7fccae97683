"""The worker's executor on a CPU: what fails does not wear it out."""

from __future__ import annotations

import queue

import pytest
import torch

from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.worker.device import Device
from streamindex_service.worker.executor import Executor
from streamindex_service.worker.key_store import MissingMemoryError

FAILED = pb.FromWorker(failed=pb.Failed(kind=pb.FAILURE_KIND_OUT_OF_MEMORY))


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
        executor.fail(1, FAILED)
        assert sent.get(timeout=20) is FAILED
    assert executor.oldest_running_ms() == 0
    executor.load_pages(pb.LoadPages(operation_id=2, page_bytes=64))
    assert sent.get(timeout=20).operation_done.operation_id == 2


def test_tiles_of_a_view_that_is_not_there_hold_no_place(executor, sent, finished):
    for tile in range(1, 20):
        with pytest.raises(MissingMemoryError):
            executor.search_tile(pb.SearchTile(tile_id=tile, sequences=[pb.SearchSequence(view_id=9)]))
        assert len(finished) == tile - 1  # it may be tried again
        executor.fail(tile, FAILED)
        assert sent.get(timeout=20) is FAILED
    assert finished == list(range(1, 20))
    assert executor.oldest_running_ms() == 0
    executor.load_pages(pb.LoadPages(operation_id=100, page_bytes=64))
    assert sent.get(timeout=20).operation_done.operation_id == 100


class _Counted:
    """Stands in for segments and extents: notes what is asked for."""

    def __init__(self, size_bytes: int) -> None:
        self.memory = torch.randint(0, 255, (2, size_bytes), dtype=torch.uint8)
        self.asked: list[tuple[int, int, int]] = []

    def bytes_at(self, number: int, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        self.asked.append((number, offset_bytes, size_bytes))
        return self.memory[number][offset_bytes : offset_bytes + size_bytes]


def test_pages_that_follow_each_other_are_one_copy(executor, sent):
    """Only those that do so on both sides, whatever order they come in."""
    page, host, device = 64, _Counted(1024), _Counted(1024)
    executor.segments, executor.store = host, device
    pages = [  # segment, page there, extent, page there
        (0, 3, 1, 5), (0, 4, 1, 6), (0, 5, 1, 7),  # three in a row
        (0, 6, 1, 9),  # a gap on the device
        (0, 8, 1, 10),  # a gap in the segment
        (1, 9, 1, 11),  # another segment
        (1, 10, 0, 12),  # another extent
        (1, 9, 0, 11),  # backwards
        (1, 9, 0, 13),  # the same page once more
    ]  # fmt: skip
    columns = list(zip(*pages, strict=True))
    message = pb.LoadPages(
        operation_id=1, page_bytes=page,
        segment_ids=columns[0], segment_offsets=[page * n for n in columns[1]],
        extent_ids=columns[2], extent_offsets=[page * n for n in columns[3]],
    )  # fmt: skip
    executor.load_pages(message)
    assert sent.get(timeout=20).operation_done.operation_id == 1
    assert host.asked[0] == (0, 3 * page, 3 * page)
    assert [size for _, _, size in host.asked[1:]] == [page] * 6
    for segment, source, extent, target in pages:
        copied = device.memory[extent][target * page : (target + 1) * page]
        assert torch.equal(copied, host.memory[segment][source * page : (source + 1) * page])
