"""Connections and headers beyond their bounds are refused while what is open goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from streamindex_client import ClientOptions, ResourceExhaustedError, RetryPolicy, UnavailableError, connect

from tests.support.inprocess import InProcessServer
from tests.support.services import ROOMY

ONCE = ClientOptions(retry=RetryPolicy(max_attempts=1), default_timeout_s=10.0)


@pytest.fixture(scope="module")
def server() -> Iterator[InProcessServer]:
    with InProcessServer({**ROOMY, "server": {"max_connections": 3}}) as running:
        yield running


def test_connections_are_bounded(server):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server.target, options=ONCE)) for _ in range(3)]
        assert all(client.load().ready for client in clients)
        with connect(server.target, options=ONCE) as one_more, pytest.raises(UnavailableError):
            one_more.load()
        assert all(client.load().ready for client in clients)


def test_headers_are_bounded(server):
    long = connect(server.target, options=ONCE, metadata=[("x-long", "x" * 20_000)])
    with long, pytest.raises(ResourceExhaustedError):
        long.load()
    with connect(server.target, options=ONCE, metadata=[("x-short", "x" * 2000)]) as client:
        assert client.load().ready
