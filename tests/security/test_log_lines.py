"""Callers cause log lines: how many, how long, and in what form."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from streamindex.v1 import key_cache_pb2, search_pb2, server_pb2

from streamindex_service.frontend.tokens import new_token
from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls, refused, search_header
from tests.support.certificates import Authority
from tests.support.services import ROOMY, wait_for
from tests.support.tensors import Kind

KIND = Kind(heads=2, head_dim=32)
LINES_PER_S = 20
TEXT = "text-of-a-caller"
TOKEN, TOKEN_LINE = new_token("caller")
METADATA = (("authorization", f"Bearer {TOKEN}"),)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    directory = tmp_path_factory.mktemp("log")
    pair = Authority(directory, "ours").issue("server", file="server", host=True)
    tokens = directory / "tokens"
    tokens.write_text(TOKEN_LINE)
    settings = {
        **ROOMY,
        "tls": {"certificate_file": str(pair.certificate), "key_file": str(pair.key)},
        "auth": {"token_file": str(tokens)},
        "log": {"max_lines_per_s": LINES_PER_S},
    }
    with RunningService(settings, tcp=True) as running:
        yield running


@pytest.fixture
def calls(service: RunningService) -> Iterator[Calls]:
    with Calls(service.address) as connection:
        connection.metadata = METADATA
        yield connection


def lines(service: RunningService, event: str | None = None) -> list[dict[str, Any]]:
    """The whole log, of which each line must be one of ours."""
    found = [json.loads(line) for line in Path(service._stderr_path).read_text().splitlines()]
    return [line for line in found if event in (None, line["event"])]


def test_handshakes_that_fail_and_messages_that_are_compressed_write_nothing(service: RunningService) -> None:
    host, _, port = service.tcp_address.rpartition(":")
    distrustful = ssl.create_default_context()
    before = len(lines(service))
    for _ in range(5):
        with socket.create_connection((host, int(port)), 10) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert plain.recv(100) == b""
        with (
            socket.create_connection((host, int(port)), 10) as connection,
            pytest.raises(ssl.SSLCertVerificationError),
        ):
            distrustful.wrap_socket(connection, server_hostname="localhost")
    with grpc.insecure_channel(service.address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=20, compression=grpc.Compression.Gzip)
    with Calls(service.address) as nobody:
        refused(nobody.server.GetLoad, server_pb2.GetLoadRequest())
    wait_for(lambda: lines(service, "refused"))  # it comes after what came before
    assert {line["event"] for line in lines(service)[before:]} == {"refused"}


def test_no_line_has_text_of_a_caller(service: RunningService, calls: Calls) -> None:
    long = TEXT * 1000
    item = search_pb2.SearchBatchItem(key_cache_id=long)
    cache = calls.create(KIND)
    refused(calls.key_caches.GetKeyCache, key_cache_pb2.GetKeyCacheRequest(key_cache_id=long), metadata=METADATA)
    refused(calls.key_caches.QueryUpload, key_cache_pb2.QueryUploadRequest(upload_id=long), metadata=METADATA)
    refused(calls.key_caches.ListKeyCaches, key_cache_pb2.ListKeyCachesRequest(page_token=long), metadata=METADATA)
    too_long = key_cache_pb2.CreateKeyCacheRequest(spec=KIND.spec())
    too_long.spec.convention = long
    refused(calls.key_caches.CreateKeyCache, too_long, metadata=METADATA)
    calls.searches.SearchBatch(search_pb2.SearchBatchRequest(items=[item], top_k=4), timeout=20, metadata=METADATA)
    for header in ({"convention": long}, {"request_key": long}):
        with calls.search_call() as call:
            call.send(search_header(KIND, cache.id, 4, **header))
            call.refusal()
    for wrong in ((("authorization", f"Bearer {TEXT}"),), (*METADATA, ("x-request-id", long[:9000]))):
        request = key_cache_pb2.GetKeyCacheRequest(key_cache_id="x")
        refused(calls.key_caches.GetKeyCache, request, metadata=wrong)
    assert TEXT not in Path(service._stderr_path).read_text()


def test_lines_of_a_kind_are_bounded_and_those_left_out_are_counted(service: RunningService, calls: Calls) -> None:
    request = key_cache_pb2.GetKeyCacheRequest(key_cache_id="x")

    def told() -> int:
        return sum(1 + line.get("left_out", 0) for line in lines(service, "refused"))

    def asked(times: int) -> None:
        for _ in range(times):
            refused(calls.key_caches.GetKeyCache, request, metadata=METADATA)

    written, started = len(lines(service, "refused")), time.monotonic()
    asked(200)
    seconds = time.monotonic() - started
    assert len(lines(service, "refused")) - written <= LINES_PER_S * (seconds + 2)
    before = told()

    def all_told() -> bool:
        asked(1)
        return told() > before

    wait_for(all_told)  # in a later second
    assert told() >= 200
