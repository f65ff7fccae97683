"""A link of packets: one protobuf message each, with a file descriptor where the message announces one.

A SOCK_SEQPACKET socket pair keeps the boundaries of messages, so there is nothing to frame and nothing to get out of
step. A packet is bounded by MAX_PACKET_BYTES; senders cut long lists into several messages.
"""

from __future__ import annotations

import array
import socket
from typing import Any

from google.protobuf.message import Message

# Well below the default socket buffer (208 KiB), which bounds a packet; see PAGES_PER_MESSAGE.
MAX_PACKET_BYTES = 128 * 1024
# Each page of a list takes at most 4 × 10 bytes of varints.
PAGES_PER_MESSAGE = 2048

# Fields of a message inside another. They become part of that, and no message of their own: protobuf frees each that
# was made by itself, and after every 10,000 pieces of memory has glibc give all that is free back to the system
# (`upb_trim_allocfunc`). That takes the frontend's loop milliseconds, and what it receives next a page fault a page.
Fields = dict[str, Any]


class LinkClosedError(ConnectionError):
    """The other side is gone."""


def make_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: Message, fd: int | None = None) -> None:
    """Send one message. Raises BlockingIOError when a non-blocking socket is full, LinkClosedError."""
    data = message.SerializeToString()
    assert len(data) <= MAX_PACKET_BYTES, f"a message of {len(data)} bytes"
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    try:
        sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise LinkClosedError from error


def receive(sock: socket.socket) -> tuple[bytes, int | None]:
    """Receive one packet and the descriptor that came with it. Raises BlockingIOError, LinkClosedError."""
    try:
        data, ancillary, flags, _ = sock.recvmsg(
            MAX_PACKET_BYTES, socket.CMSG_SPACE(4 * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionResetError as error:
        raise LinkClosedError from error
    if not data:
        raise LinkClosedError
    assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), "a packet was cut"
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    assert len(fds) <= 1
    return data, fds[0] if fds else None
