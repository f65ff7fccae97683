"""Plain sockets: a process that receives bytes and drops them, and a sender.

python -m streamindex_service.bench.drain PATH        listens on the unix socket PATH and on TCP; prints the port
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

_LENGTH = struct.Struct("<Q")
_BUFFER_BYTES = 1 << 20

Address: TypeAlias = str | tuple[str, int]


def serve(path: str) -> None:
    """Receive for ever. Prints the TCP port once both listen."""
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(path)
    tcp = socket.create_server(("127.0.0.1", 0))
    unix.listen()
    for listener in (unix, tcp):
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    sys.stdout.write(f"{tcp.getsockname()[1]}\n")
    sys.stdout.flush()
    threading.Event().wait()


@contextmanager
def drain() -> Iterator[dict[str, Address]]:
    """The receiver's addresses by kind of socket."""
    with tempfile.TemporaryDirectory(prefix="streamindex-") as directory:
        path = f"{directory}/drain.sock"
        command = [sys.executable, "-m", "streamindex_service.bench.drain", path]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            yield {"unix": path, "tcp": ("127.0.0.1", port)}
        finally:
            process.terminate()
            process.wait(10)


def send_seconds(address: Address, data: memoryview) -> float:
    """Send bytes over a new connection until the receiver has seen them all."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as connection:
        connection.connect(address)
        start = time.perf_counter()
        connection.sendall(_LENGTH.pack(data.nbytes))
        connection.sendall(data)
        if connection.recv(1) != b"+":
            raise RuntimeError("the receiver went away")
        return time.perf_counter() - start


def _accept(listener: socket.socket) -> None:
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    while True:
        connection, _ = listener.accept()
        with connection:
            (left,) = _LENGTH.unpack(connection.recv(_LENGTH.size, socket.MSG_WAITALL))
            while left and (received := connection.recv_into(buffer[: min(left, _BUFFER_BYTES)])):
                left -= received
            if not left:
                connection.sendall(b"+")


if __name__ == "__main__":
    serve(sys.argv[1])
