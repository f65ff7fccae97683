"""A unix socket that knows the user at its other end.

gRPC does not tell who connects. So this accepts in its place, asks the kernel (SO_PEERCRED), and passes the bytes of
those who may call on to gRPC's own socket, which lies beside it, in a directory that nobody else can enter; what a
server that was killed has left there is taken over. The end that connects there is bound to an abstract name that says
the user: gRPC gives it as the call's peer. The name has a random part, so that it cannot be taken beforehand; whoever
could reach gRPC's socket to forge one is the service's own user or root.

Each connection costs two threads and a copy of its bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import stat
import struct
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

_BUFFER_BYTES = 256 << 10
_BACKLOG = 128
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_JOIN_S = 2.0


class PeerSocket:
    """Made before gRPC listens on `upstream`; `start` after that, then `stop`. Raises OSError when it cannot listen."""

    def __init__(self, path: str, uids: Collection[int], max_connections: int, log: Any) -> None:
        self._uids = frozenset(uids)
        self._most = max_connections
        self._log = log
        self._directory = Path(f"{path}.d")
        self.upstream = str(self._directory / "s")  # a socket's path has 107 bytes at most
        self._secret = secrets.token_hex(12)
        self._peer = re.compile(rf"unix-abstract:streamindex-{self._secret}-(\d+)-\d+")
        self._connections: set[_Connection] = set()
        self._count = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        self._listener.bind(path)
        try:
            _take(self._directory)
        except OSError:
            self._listener.close()
            os.unlink(path)
            raise
        os.chmod(path, 0o666)  # noqa: S103 (who may call is decided by user, below)

    def start(self) -> None:
        """Accept from now on."""
        self._loop = asyncio.get_running_loop()
        self._listener.listen(_BACKLOG)
        self._loop.add_reader(self._listener, self._accept)

    def stop(self) -> None:
        """Accept no more, and end what is connected."""
        if self._listener.fileno() < 0:
            return
        with contextlib.suppress(AttributeError):  # it was never started
            self._loop.remove_reader(self._listener)
        self._listener.close()
        for connection in list(self._connections):
            connection.end()
        for connection in list(self._connections):
            connection.join(_JOIN_S)
        shutil.rmtree(self._directory, ignore_errors=True)

    def uid_of(self, peer: str) -> int | None:
        """The user at the other end of a gRPC peer; None for a peer that did not come through here."""
        match = self._peer.fullmatch(peer)
        return int(match[1]) if match else None

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # it has gone, or there are no descriptors: gRPC's own listeners live with that as well
            return
        _, uid, _ = _CREDENTIALS.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid not in self._uids or len(self._connections) >= self._most:
            self._log.warning("connection_refused", uid=uid, allowed=uid in self._uids, open=len(self._connections))
            client.close()
            return
        self._count += 1
        upstream = socket.socket(socket.AF_UNIX)
        try:
            upstream.bind(f"\0streamindex-{self._secret}-{uid}-{self._count}")
            upstream.connect(self.upstream)
        except OSError as error:
            self._log.error("connection_not_passed_on", detail=repr(error))
            client.close()
            upstream.close()
            return
        connection = _Connection(client, upstream, self._connections.discard)
        self._connections.add(connection)
        try:
            connection.start()
        except RuntimeError as error:  # there are no threads left
            self._log.error("connection_not_passed_on", detail=repr(error))


def _take(directory: Path) -> None:
    """A directory that nobody else can enter, new or left behind. Raises OSError for one that is somebody else's."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            text = f"{directory} is there and is not a directory that the service's user alone can enter"
            raise PermissionError(errno.EPERM, text) from None
        (directory / "s").unlink(missing_ok=True)


class _Connection:
    """Bytes both ways, each on a thread, until both ends have ended."""

    def __init__(self, client: socket.socket, upstream: socket.socket, closed: Any) -> None:
        self._ends = (client, upstream)
        self._closed = closed
        self._left = 2
        self._lock = threading.Lock()
        for end in self._ends:
            end.setblocking(True)
        pairs = (client, upstream), (upstream, client)
        self._threads = [threading.Thread(target=self._pump, args=pair, name="peer", daemon=True) for pair in pairs]

    def start(self) -> None:
        """Raises RuntimeError when the system has no threads; then it ends by itself."""
        started = 0
        try:
            for thread in self._threads:
                thread.start()
                started += 1
        except RuntimeError:
            self.end()
            self._leave(len(self._threads) - started)
            raise

    def end(self) -> None:
        """Wake both threads."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def join(self, timeout_s: float) -> None:
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout_s)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        try:
            while size := source.recv_into(buffer):
                target.sendall(buffer[:size])
            target.shutdown(socket.SHUT_WR)
        except OSError:  # one of the two has gone: so does the other
            self.end()
        self._leave(1)

    def _leave(self, threads: int) -> None:
        """So many threads have ended, or never will begin; the last one closes both ends."""
        with self._lock:
            self._left -= threads
            if self._left:
                return
        for end in self._ends:
            end.close()
        self._closed(self)
