"""The socket that knows who connects, where the system has no threads to pass bytes on."""

from __future__ import annotations

import asyncio
import os
import socket
import threading

import pytest
import structlog

from streamindex_service.frontend.peer_socket import PeerSocket
from tests.support.resources import descriptors_of


@pytest.mark.parametrize("started", [0, 1])
async def test_a_connection_without_threads_is_closed_and_leaves_its_place(tmp_path, monkeypatch, started):
    peers = PeerSocket(str(tmp_path / "s.sock"), {os.getuid()}, 1, structlog.get_logger())
    upstream = socket.socket(socket.AF_UNIX)
    upstream.bind(peers.upstream)
    upstream.listen()
    upstream.setblocking(False)
    peers.start()
    loop, start, left = asyncio.get_running_loop(), threading.Thread.start, [started]

    def scarce(thread):
        if thread.name == "peer":
            if not left[0]:
                raise RuntimeError("can't start new thread")
            left[0] -= 1
        start(thread)

    async def connect() -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        await loop.sock_connect(client, str(tmp_path / "s.sock"))
        return client

    try:
        async with asyncio.timeout(20):
            before = len(descriptors_of(os.getpid()))
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", scarce)
                with await connect() as client:
                    assert await loop.sock_recv(client, 1) == b""
            (await loop.sock_accept(upstream))[0].close()
            # the thread that did start ends by itself
            while peers._connections or len(descriptors_of(os.getpid())) != before:  # noqa: ASYNC110 - a thread does it
                await asyncio.sleep(0.001)
            with await connect() as client:  # in the one place that there is
                passed_on, _ = await loop.sock_accept(upstream)
                with passed_on:
                    await loop.sock_sendall(client, b"x")
                    assert await loop.sock_recv(passed_on, 1) == b"x"
    finally:
        upstream.close()
        peers.stop()
