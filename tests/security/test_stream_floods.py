"""Calls that are opened and taken back at once: HTTP/2's cheapest way to have a server do work for nobody."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from pathlib import Path

from tests.support.calls import TIMEOUT_S, Calls
from tests.support.inprocess import InProcessServer
from tests.support.services import MIB, ROOMY

CONNECTIONS, STREAMS = 4, 20_000
CANCEL = struct.pack(">I", 8)
HEADERS, RST_STREAM, SETTINGS, PING = 1, 3, 4, 6
ACK, END_HEADERS = 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FIELDS = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/streamindex.v1.SearchService/SearchBatch",
    ":authority": "x",
    "te": "trailers",
    "content-type": "application/grpc",
}


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def text(value: str) -> bytes:
    return bytes([len(value)]) + value.encode()


class Flood:
    """A connection that sends frames as fast as they are taken, and meanwhile acknowledges what the server asks for."""

    def __init__(self, path: Path) -> None:
        self._peer = socket.socket(socket.AF_UNIX)
        self._peer.connect(str(path))
        self._sending = threading.Lock()  # frames are whole
        self._reader = threading.Thread(target=self._acknowledge)
        self._reader.start()
        self.send([PREFACE + frame(SETTINGS, 0, 0, b"")])

    def send(self, pieces: list[bytes]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the server has had enough of it
            for piece in pieces:
                with self._sending:
                    self._peer.sendall(piece)

    def _acknowledge(self) -> None:
        received = self._peer.makefile("rb")
        with contextlib.suppress(OSError):
            while len(head := received.read(9)) == 9:
                payload = received.read(int.from_bytes(head[:3], "big"))
                if head[3] in (SETTINGS, PING) and not head[4] & ACK:
                    answer = frame(head[3], ACK, 0, payload if head[3] == PING else b"")
                    with self._sending:
                        self._peer.sendall(answer)

    def __enter__(self) -> Flood:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._peer.close()


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_streams_that_are_opened_and_reset_take_little_memory() -> None:
    """While Python takes none of them, as in the middle of a large message: gRPC's threads go on receiving."""
    headers = b"".join(b"\0" + text(name) + text(value) for name, value in FIELDS.items())
    streams = [
        frame(HEADERS, END_HEADERS, stream, headers) + frame(RST_STREAM, 0, stream, CANCEL)
        for stream in range(1, 2 * STREAMS, 2)
    ]
    pieces = [b"".join(streams[first : first + 100]) for first in range(0, STREAMS, 100)]
    over = threading.Event()
    with InProcessServer(ROOMY) as server, Calls(server.target) as calls:
        before = resident_bytes()
        busy = threading.Thread(target=lambda: server.run(lambda: over.wait(TIMEOUT_S)))
        busy.start()
        try:
            with contextlib.ExitStack() as peers:
                floods = [peers.enter_context(Flood(server.socket_path)) for _ in range(CONNECTIONS)]
                senders = [threading.Thread(target=each.send, args=(pieces,)) for each in floods]
                for each in senders:
                    each.start()
                for each in senders:
                    each.join()
                grown = resident_bytes() - before
        finally:
            over.set()
            busy.join()
        assert grown < 128 * MIB
        assert calls.load().ready
