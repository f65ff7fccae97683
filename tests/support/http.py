"""HTTP over a real socket, byte by byte where a test wants that."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from dataclasses import dataclass

TIMEOUT_S = 10.0
_FIRST_PORT, _WORKERS, _WORKER_PORTS = 21_000, 10, 1000


@dataclass(frozen=True)
class Response:
    status: int
    headers: dict[str, str]
    body: bytes


def free_port() -> int:
    """A port that nobody listens on. It is below those that the system gives to whoever asks for any, and each process
    of the tests has some of its own: nobody else takes it before the service under test does."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = _FIRST_PORT + number % _WORKERS * _WORKER_PORTS
    for port in random.sample(range(first, first + _WORKER_PORTS), _WORKER_PORTS):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), TIMEOUT_S)


def read_all(connection: socket.socket) -> bytes:
    """Until the other side closes."""
    parts = []
    while part := connection.recv(65_536):
        parts.append(part)
    return b"".join(parts)


def exchange(port: int, data: bytes) -> Response:
    """Send bytes, read the answer."""
    with connect(port) as connection:
        connection.sendall(data)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Response(int(first.split(" ")[1]), headers, body)


def request(port: int, path: str, method: str = "GET", host: str = "localhost", **headers: str) -> Response:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{port}", *(f"{k}: {v}" for k, v in headers.items())]
    return exchange(port, "\r\n".join([*lines, "", ""]).encode())
