"""The unix socket knows users by what the kernel says of them."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from streamindex_client import AuthenticationError, ClientOptions, NotFoundError, RetryPolicy, UnavailableError, connect

from streamindex_service.frontend.peer_socket import PeerSocket
from streamindex_service.frontend.tokens import new_token
from streamindex_service.testing.service import RunningService
from tests.support.inprocess import InProcessServer
from tests.support.services import ROOMY, wait_for

ONCE = ClientOptions(retry=RetryPolicy(max_attempts=1), default_timeout_s=10.0)
SPEC = {"heads": 2, "head_dim": 32, "ratio": 1, "key_format": "fp32", "layers": 1}
NOBODY_UID = 65534
SETRESUID = {"x86_64": 117, "aarch64": 147}.get(platform.machine())  # of a thread: glibc's is of the whole process
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty settings


def server(*uids: int, token_file: Path | None = None) -> InProcessServer:
    auth = {"unix_uids": uids, "token_file": str(token_file or "")}
    return InProcessServer({**ROOMY, "auth": auth}, identify=None)


def test_a_user_is_a_caller_and_bytes_pass_unchanged(tmp_path):
    (token, line), file = new_token("x"), tmp_path / "tokens"
    file.write_text(line)
    keys = np.random.default_rng(1).standard_normal((20_000, 32), dtype=np.float32)
    with (
        server(os.getuid(), token_file=file) as running,
        connect(running.target, options=ONCE) as user,
        connect(running.target, options=ONCE, token=token) as named,
    ):
        cache = user.create_key_cache(**SPEC)
        cache.append(layer=0, keys=keys)
        query = keys[777].reshape(1, 1, 32).repeat(2, axis=1)
        weights = np.ones((1, 2), np.float32)
        (part,) = list(cache.search(layer=0, q=query, w=weights, top_k=1, start_position=len(keys)))
        scores = np.maximum(keys @ keys[777], 0)
        assert part.indices[0, 0] == int(np.argmax(scores))
        with pytest.raises(NotFoundError):
            named.open_key_cache(cache.id)
        owners = running.run(lambda: {account.caller for account in running.server.service.caches.accounts})
        assert owners == {f"uid:{os.getuid()}"}


def test_a_user_who_is_not_named_gets_no_connection(monkeypatch):
    with server(os.getuid()) as running:
        monkeypatch.setattr(running.server._peers, "_uids", frozenset({os.getuid() + 1}))
        with connect(running.target, options=ONCE) as client, pytest.raises(UnavailableError):
            client.load()


def connect_as(uid: int, path: Path) -> bytes:
    """What the service says to a process of this user that speaks HTTP/2."""
    set_user = ctypes.CDLL(None, use_errno=True).syscall

    def on_thread() -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            assert set_user(SETRESUID, -1, uid, -1) == 0
            try:
                connection.connect(str(path))
            finally:
                assert set_user(SETRESUID, -1, 0, -1) == 0
            try:
                connection.sendall(PREFACE)
                return connection.recv(100)
            except (BrokenPipeError, ConnectionResetError):
                return b""

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(on_thread).result()


@pytest.mark.skipif(os.getuid() != 0 or SETRESUID is None, reason="only root may act as another user")
def test_what_counts_is_the_user_of_the_other_end():
    with server(os.getuid(), NOBODY_UID) as running:
        os.chmod(running.socket_path.parent, 0o755)
        for uid, is_served in ((NOBODY_UID, True), (NOBODY_UID - 1, False), (os.getuid(), True)):
            assert bool(connect_as(uid, running.socket_path)) == is_served, uid


def test_a_peers_name_tells_the_user_and_cannot_be_guessed(tmp_path):
    peers = PeerSocket(str(tmp_path / "s"), [1], 1, None)
    secret = peers._secret
    assert peers.uid_of(f"unix-abstract:streamindex-{secret}-1000-7") == 1000
    for other in (
        "unix:",
        "unix-abstract:streamindex--1000-7",
        f"unix:streamindex-{secret}-1000-7",
        "ipv4:127.0.0.1:1",
    ):
        assert peers.uid_of(other) is None
    peers.stop()
    assert not os.path.exists(os.path.dirname(peers.upstream))


def test_what_a_killed_service_leaves_is_taken_over_and_nothing_is_left_in_the_end(tmp_path):
    settings = {**ROOMY, "auth": {"unix_uids": (os.getuid(),)}}
    with RunningService(settings, environment={"TMPDIR": str(tmp_path)}) as running:
        place = running.socket_path.parent
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait(10)
        running.start()
        with connect(running.address, options=ONCE) as client:
            assert client.load().ready
        assert {path.name for path in place.iterdir()} == {"s.sock", "s.sock.d", "stdout", "stderr"}
        running.process.terminate()
        assert running.process.wait(20) == 0
        assert {path.name for path in place.iterdir()} == {"stdout", "stderr"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["a file", "a directory for all", "a link"])
def test_a_place_that_is_not_the_services_own_is_not_used(tmp_path, what):
    """The socket may lie where others can write: what they put there before is not entered."""
    place = tmp_path / "s.sock.d"
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    if what == "a file":
        place.touch()
    elif what == "a link":
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.mkdir()
        place.chmod(0o777)
    with pytest.raises(PermissionError, match="alone can enter"):
        PeerSocket(str(tmp_path / "s.sock"), [1], 1, None)
    assert not (tmp_path / "s.sock").exists()


def test_tcp_callers_are_not_users():
    auth = {"unix_uids": (os.getuid(),)}
    settings = {**ROOMY, "auth": auth, "server": {"tcp_address": "127.0.0.1:0", "sweep_s": 0.1}}
    with (
        RunningService(settings, tcp=True) as running,
        connect(running.tcp_address, options=ONCE) as there,
        pytest.raises(AuthenticationError),
    ):
        there.load()


def test_connections_leave_nothing_behind():
    with server(os.getuid()) as running:

        def use() -> None:
            with connect(running.target, options=ONCE) as client:
                assert client.load().ready

        use()
        peers = running.server._peers
        assert peers is not None
        wait_for(lambda: not peers._connections)
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            use()
        wait_for(lambda: not peers._connections)
        wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "peer"])
        assert len(os.listdir("/proc/self/fd")) <= files + 2
        upstream = peers.upstream
    assert not os.path.exists(upstream)
    with connect(running.target, options=ONCE) as client, pytest.raises(UnavailableError):
        client.load()
