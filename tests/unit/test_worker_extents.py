"""Extents of the worker: those that wait to be used again, and who finds no memory beside them."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
import torch

from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.worker.__main__ import Worker
from streamindex_service.worker.device import Device
from streamindex_service.worker.executor import Executor
from streamindex_service.worker.extents import Extents, MissingMemoryError
from streamindex_service.worker.memory import DeviceMemory


class _Gpu(Device):
    """A device that counts as a GPU and has its memory in the host's."""

    @property
    def is_cuda(self) -> bool:
        return True


@pytest.fixture
def extents():
    return Extents(_Gpu(torch.device("cpu"), "no gpu", 1 << 30))


def test_a_freed_extent_serves_the_next_of_its_length_alone(extents):
    extents.allocate(1, 4096)
    extents.allocate(2, 1024)
    places = {number: extents[number].data_ptr() for number in (1, 2)}
    extents.free(1)
    extents.free(2)
    assert (extents.size_bytes, extents.spare_bytes) == (0, 5120)
    extents.allocate(3, 2048)  # neither is cut up for it, nor is the longer one used whole
    assert (extents.size_bytes, extents.spare_bytes) == (2048, 5120)
    extents.allocate(4, 4096)
    extents.allocate(5, 1024)
    assert (extents[4].data_ptr(), extents[5].data_ptr()) == (places[1], places[2])
    assert (extents.size_bytes, extents.spare_bytes) == (7168, 0)


def test_what_was_freed_or_never_there_is_missing(extents):
    extents.allocate(1, 4096)
    extents.free(1)
    extents.free(1)
    extents.free(2)
    assert extents.spare_bytes == 4096
    for number in (1, 2):
        with pytest.raises(MissingMemoryError, match=f"extent {number}"):
            extents[number]


def test_on_a_cpu_nothing_waits():
    extents = Extents(Device(torch.device("cpu"), "cpu", 1 << 30))
    extents.allocate(1, 4096)
    extents.free(1)
    assert (extents.size_bytes, extents.spare_bytes) == (0, 0)


class _Store:
    def __init__(self, extents: Extents) -> None:
        self.extents = extents


class _ShortExecutor:
    """Finds memory for an operation only when as many bytes wait for nobody."""

    def __init__(self, extents: Extents, most_spare_bytes: int, send: Callable[[pb.FromWorker], None]) -> None:
        self.send = send
        self.store = _Store(extents)
        self.most_spare_bytes = most_spare_bytes
        self.tries = 0

    def load_pages(self, message: pb.LoadPages) -> None:
        self.tries += 1
        if self.store.extents.spare_bytes > self.most_spare_bytes:
            raise torch.OutOfMemoryError("none left")

    def fail(self, work_id: int, reply: pb.FromWorker) -> None:
        assert reply.failed.id == work_id
        self.send(reply)

    def memory(self) -> DeviceMemory:
        return DeviceMemory()


@pytest.fixture
def link():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ours, theirs
    ours.close()
    theirs.close()


def _replies(link: tuple[socket.socket, socket.socket]) -> list[pb.FromWorker]:
    link[0].setblocking(False)
    found = []
    while True:
        try:
            found.append(pb.FromWorker.FromString(link[0].recv(1 << 16)))
        except BlockingIOError:
            return found


@pytest.mark.parametrize(("most_spare_bytes", "tries", "fails"), [(0, 2, False), (-1, 2, True), (8192, 1, False)])
def test_memory_that_waits_goes_to_whoever_finds_none(extents, link, most_spare_bytes, tries, fails):
    extents.allocate(1, 4096)
    extents.free(1)
    worker = Worker(link[1])
    worker._executor = executor = _ShortExecutor(extents, most_spare_bytes, worker._send)
    worker._try(pb.ToWorker(load_pages=pb.LoadPages(operation_id=7)), None)
    assert executor.tries == tries
    assert extents.spare_bytes == (4096 if tries == 1 else 0)
    kinds = [(reply.failed.id, reply.failed.kind) for reply in _replies(link)]
    assert kinds == ([(7, pb.FAILURE_KIND_OUT_OF_MEMORY)] if fails else [])


def test_without_anything_that_waits_it_is_tried_once(extents, link):
    worker = Worker(link[1])
    worker._executor = executor = _ShortExecutor(extents, -1, worker._send)
    worker._try(pb.ToWorker(load_pages=pb.LoadPages(operation_id=7)), None)
    assert executor.tries == 1
    assert [reply.failed.kind for reply in _replies(link)] == [pb.FAILURE_KIND_OUT_OF_MEMORY]


def test_what_waits_is_not_told_as_held(extents):
    executor = Executor(Device(torch.device("cpu"), "cpu", 1 << 30), "chunked", "chunked", lambda message: None)
    executor.finish()
    executor.store.extents = extents
    assert executor._memory._spare_bytes() == 0
    extents.allocate(1, 4096)
    extents.free(1)
    assert executor._memory._spare_bytes() == 4096
