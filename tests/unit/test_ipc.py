"""Segments and links: what two processes share, and nothing more."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket

import pytest

from streamindex_service.ipc import link
from streamindex_service.ipc.segments import Segment
from streamindex_service.ipc.v1 import worker_pb2 as pb


@pytest.fixture
def segment():
    made = Segment.create(10_000)
    yield made
    made.close()


@pytest.fixture
def ends():
    ours, theirs = link.make_pair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_a_segment_is_zeros_of_its_length(segment):
    assert (segment.size_bytes, os.fstat(segment.fd).st_size) == (10_000, 10_000)
    assert bytes(segment.view(0, 10_000)) == bytes(10_000)


@pytest.mark.parametrize("length", [0, 9_999, 10_001, 1 << 30])
def test_a_segment_keeps_its_length(segment, length):
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, length)
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_segment_is_not_inherited(segment):
    assert not os.get_inheritable(segment.fd)


def test_both_sides_see_one_memory(segment):
    other = Segment.receive(os.dup(segment.fd), 10_000, writable=False)
    segment.view(5_000, 3)[:] = b"abc"
    assert bytes(other.view(4_999, 5)) == b"\0abc\0"
    with pytest.raises(TypeError):
        other.view(0, 1)[:] = b"x"
    writer = Segment.receive(os.dup(segment.fd), 10_000, writable=True)
    writer.view(0, 1)[:] = b"y"
    assert bytes(segment.view(0, 1)) == b"y"
    other.close()
    writer.close()


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (0, 10_001), (10_000, 1), (2**63, 1)])
def test_views_beyond_the_end(segment, offset, size):
    with pytest.raises(ValueError, match="outside a segment"):
        segment.view(offset, size)


@pytest.mark.parametrize("announced", [9_999, 10_001])
def test_a_segment_of_another_length_is_not_taken(segment, announced):
    fd = os.dup(segment.fd)
    with pytest.raises(ValueError, match="not as long"):
        Segment.receive(fd, announced, writable=False)
    os.close(fd)


def test_memory_that_could_shrink_under_its_reader_is_not_taken():
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, mmap.PAGESIZE)
    with pytest.raises(ValueError, match="not sealed"):
        Segment.receive(fd, mmap.PAGESIZE, writable=False)
    os.close(fd)


def test_the_memory_outlives_its_descriptor_while_it_is_looked_at():
    segment = Segment.create(100)
    view = segment.view(0, 100)
    segment.close()
    view[:] = b"z" * 100
    assert bytes(view) == b"z" * 100


def receive_all(sock):
    while True:
        link.receive(sock)


def send_for_ever(sock):
    while True:
        link.send(sock, pb.ToWorker(ping=pb.Ping(sequence=1)))


def test_packets_keep_their_bounds(ends):
    ours, theirs = ends
    sent = [pb.ToWorker(ping=pb.Ping(sequence=number)) for number in range(1, 20)]
    for message in sent:
        link.send(ours, message)
    received = [link.receive(theirs) for _ in sent]
    assert [pb.ToWorker.FromString(data) for data, _ in received] == sent
    assert [fd for _, fd in received] == [None] * len(sent)


def test_a_descriptor_travels_with_its_packet(ends, segment):
    ours, theirs = ends
    segment.view(0, 2)[:] = b"hi"
    link.send(ours, pb.ToWorker(ping=pb.Ping(sequence=1)))
    link.send(ours, pb.ToWorker(map_segment=pb.MapSegment(segment_id=7, segment_bytes=10_000)), segment.fd)
    link.send(ours, pb.ToWorker(ping=pb.Ping(sequence=2)))
    fds = []
    for _ in range(3):
        data, fd = link.receive(theirs)
        fds.append((pb.ToWorker.FromString(data).WhichOneof("message"), fd is not None))
        if fd is not None:
            assert not os.get_inheritable(fd)
            other = Segment.receive(fd, 10_000, writable=False)
            assert bytes(other.view(0, 2)) == b"hi"
            other.close()
    assert fds == [("ping", False), ("map_segment", True), ("ping", False)]


def test_the_longest_messages_fit_a_packet(ends):
    ours, theirs = ends
    most = [2**63] * link.PAGES_PER_MESSAGE
    message = pb.ToWorker(
        load_pages=pb.LoadPages(
            operation_id=2**63,
            page_bytes=2**63,
            segment_ids=most,
            segment_offsets=most,
            extent_ids=most,
            extent_offsets=most,
        )
    )
    link.send(ours, message)
    data, _ = link.receive(theirs)
    assert pb.ToWorker.FromString(data) == message


def test_a_message_beyond_the_bound_is_a_defect_of_ours(ends):
    failed = pb.FromWorker(failed=pb.Failed(detail="x" * link.MAX_PACKET_BYTES))
    with pytest.raises(AssertionError):
        link.send(ends[0], failed)


def test_the_other_side_is_gone(ends):
    ours, theirs = ends
    theirs.close()
    with pytest.raises(link.LinkClosedError):
        link.receive(ours)
    with pytest.raises(link.LinkClosedError):
        link.send(ours, pb.ToWorker(shutdown=pb.Shutdown()))


def test_gone_with_a_packet_unread(ends):
    ours, theirs = ends
    link.send(ours, pb.ToWorker(shutdown=pb.Shutdown()))
    link.send(theirs, pb.FromWorker(pong=pb.Pong(sequence=3)))
    theirs.close()
    with pytest.raises(link.LinkClosedError):
        receive_all(ours)


def test_a_link_that_is_full_or_empty_does_not_block(ends):
    ours, theirs = ends
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        link.receive(ours)
    with pytest.raises(BlockingIOError):
        send_for_ever(ours)
    assert isinstance(theirs, socket.socket)
    assert link.receive(theirs)[1] is None
