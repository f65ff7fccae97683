"""What the metrics port bears: other methods, names, lengths, and peers that send or read nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.support.http import connect, exchange, free_port, read_all, request
from tests.support.inprocess import InProcessServer
from tests.support.services import ROOMY, wait_for


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    chosen = free_port()
    with InProcessServer({**ROOMY, "metrics": {"port": chosen, "max_connections": 3, "timeout_s": 0.5}}):
        yield chosen


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get"])
def test_only_get_and_head(port, method):
    answer = request(port, "/metrics", method)
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/", "/metrics", "/status.json", "/healthz", "/livez"])
def test_head_is_get_without_the_body(port, path):
    head, get = request(port, path, "HEAD"), request(port, path)
    assert (head.status, get.status) == (200, 200)
    assert head.body == b""
    assert len(get.body) == int(get.headers["content-length"]) > 0
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("path", ["/no", "/metrics/", "/../etc/passwd", "/%2e%2e/x", "//"])
def test_there_is_nothing_else(port, path):
    assert request(port, path).status == 404


def test_a_query_is_passed_over(port):
    assert request(port, "/healthz?x=1").status == 200


@pytest.mark.parametrize("host", ["evil.example", "10.0.0.1", "localhost.evil.example", ""])
def test_a_foreign_name_is_refused(port, host):
    assert request(port, "/metrics", host=host).status == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_names_of_this_host_are_not(port, host):
    assert request(port, "/livez", host=host).status == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /metrics HTTP/2\r\n\r\n",
        b"GET metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nno header\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n folded: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(port, data):
    assert exchange(port, data).status == 400


def test_a_long_head_is_refused(port):
    assert exchange(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000).status == 431


def test_silent_peers_are_let_go_and_are_no_more_than_a_few(port):
    silent = [connect(port) for _ in range(3)]
    try:
        for each in silent[:2]:
            each.sendall(b"GET / HT")  # slowly
        with connect(port) as one_more:
            assert read_all(one_more) == b""
        for each in silent:
            assert read_all(each) == b""  # its end, or this would take longer than it waits
    finally:
        for each in silent:
            each.close()
    wait_for(lambda: request(port, "/livez").status == 200)


def test_a_peer_that_never_closes_is_let_go(port):
    with connect(port) as peer:
        peer.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_all(peer).endswith(b"alive\n")
        time.sleep(0.6)
    assert request(port, "/livez").status == 200


def test_nothing_listens_when_it_is_switched_off():
    chosen = free_port()
    with InProcessServer(ROOMY) as inside:
        assert inside.server.settings.metrics.port == 0
        with pytest.raises(ConnectionRefusedError):
            connect(chosen)
