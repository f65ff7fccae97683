"""What one peer could make large: messages, calls, requests that are held, what one caller owns. Each has its bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from streamindex.v1 import key_cache_pb2, server_pb2

from streamindex_service.frontend.health import MAX_REQUEST_BYTES
from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls, key_chunks, refused, start_message
from tests.support.inprocess import InProcessServer, caller_in_metadata
from tests.support.resources import peak_bytes
from tests.support.services import MIB, ROOMY, wait_for
from tests.support.tensors import Draw, Kind

KIND = Kind(heads=2, head_dim=32)
STREAMS, HEALTH_WATCHERS, CACHES, UPLOADS = 32, 3, 2, 2  # a stream that was cancelled counts for a while
COMPRESSED = [grpc.Compression.Gzip, grpc.Compression.Deflate]
METHODS = {
    "unary_unary": ["/streamindex.v1.SearchService/SearchBatch", "/grpc.health.v1.Health/Check"],
    "unary_stream": ["/streamindex.v1.ServerService/WatchLoad", "/grpc.health.v1.Health/Watch"],
    "stream_stream": [
        "/streamindex.v1.KeyCacheService/AppendKeys",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
}


@pytest.fixture(scope="module")
def server() -> Iterator[InProcessServer]:
    settings = {
        **ROOMY,
        "server": {"max_streams_per_connection": STREAMS, "max_health_watchers": HEALTH_WATCHERS},
        "limits": {"max_caller_caches": CACHES, "max_caller_host_bytes": MIB, "max_caller_uploads": UPLOADS},
    }
    with InProcessServer(settings, caller_in_metadata) as running:
        yield running


def compressed_call(channel: grpc.Channel, kind: str, path: str, data: bytes, how: grpc.Compression) -> grpc.StatusCode:
    """How a call with one message ends."""
    call = getattr(channel, kind)(path)
    try:
        answer = call(iter([data]) if kind == "stream_stream" else data, timeout=60, compression=how)
        if kind != "unary_unary":
            next(answer)
            answer.cancel()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("how", COMPRESSED, ids=["gzip", "deflate"])
@pytest.mark.parametrize(("kind", "path"), [(kind, path) for kind, paths in METHODS.items() for path in paths])
def test_nothing_is_unpacked(server: InProcessServer, kind: str, path: str, how: grpc.Compression) -> None:
    with grpc.insecure_channel(server.target) as channel:
        assert compressed_call(channel, kind, path, b"\0" * 1000, how) is grpc.StatusCode.UNIMPLEMENTED


def test_a_small_message_does_not_become_a_large_one(roomy_service: RunningService) -> None:
    """256 MiB of zeros are 1/4 MiB on the wire: to unpack them would take more than the limit of a message."""
    before = peak_bytes(roomy_service.process.pid)
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(roomy_service.address, options) as channel:
        path, gzip = METHODS["unary_unary"][0], grpc.Compression.Gzip
        code = compressed_call(channel, "unary_unary", path, b"\0" * (256 * MIB), gzip)
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert peak_bytes(roomy_service.process.pid) - before < 64 * MIB


def test_a_request_that_is_held_is_short(server: InProcessServer) -> None:
    request = health_pb2.HealthCheckRequest(service="x" * MAX_REQUEST_BYTES)
    with Calls(server.target) as calls:
        refusal = refused(lambda: next(calls.health_stub.Watch(request, timeout=20)))
        assert (refusal.code, refusal.error.metadata["max"]) == (grpc.StatusCode.INVALID_ARGUMENT, "256")
        request.service = "x" * (MAX_REQUEST_BYTES // 2)  # no service's name, but one that may be asked for
        watch = calls.health_stub.Watch(request, timeout=20)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


def test_as_many_watch_the_health_as_may(server: InProcessServer) -> None:
    with Calls(server.target) as calls:

        def watch() -> Any:
            return calls.health_stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)

        wait_for(lambda: server.run(lambda: server.server._health._watching) == 0)
        watching = [watch() for _ in range(HEALTH_WATCHERS)]
        assert all(next(each).status == health_pb2.HealthCheckResponse.SERVING for each in watching)
        refusal = refused(lambda: next(watch()))
        assert (refusal.error.reason, refusal.error.metadata["limit"]) == ("TOO_MANY", str(HEALTH_WATCHERS))
        assert calls.health_stub.Check(health_pb2.HealthCheckRequest(), timeout=20).status == 1
        for each in watching:
            each.cancel()
        wait_for(lambda: server.run(lambda: server.server._health._watching) == 0)
        another = watch()
        assert next(another).status == health_pb2.HealthCheckResponse.SERVING
        another.cancel()


def test_calls_of_one_connection_are_bounded(server: InProcessServer) -> None:
    """One more waits for its turn, while another connection is served."""
    with Calls(server.target) as calls, Calls(server.target) as others:
        open_calls = [calls.append_call() for _ in range(STREAMS)]
        try:
            for each in open_calls:  # it is there once the server has sent its headers
                each.rpc.initial_metadata()
            one_more = calls.server.GetLoad.future(server_pb2.GetLoadRequest(), timeout=60)
            assert all(others.load().ready for _ in range(20))
            assert not one_more.done()
        finally:
            for each in open_calls:
                each.cancel()
        assert one_more.result().ready


def test_what_one_caller_owns_is_bounded_and_others_go_on(server: InProcessServer) -> None:
    with Calls(server.target, "greedy") as greedy, Calls(server.target, "other") as other:
        mine = [greedy.create(KIND) for _ in range(CACHES)]
        request = key_cache_pb2.CreateKeyCacheRequest(spec=KIND.spec())
        refusal = refused(greedy.key_caches.CreateKeyCache, request, metadata=greedy.metadata)
        assert (refusal.error.reason, refusal.error.metadata["limit"]) == ("TOO_MANY", str(CACHES))
        keys = Draw(1).keys(KIND, 2 * MIB // KIND.row_bytes)
        upload, _ = greedy.start_upload(mine[0].id, len(keys))
        with upload:
            upload.send(*key_chunks(KIND, keys, 4096))
            refusal = upload.refusal()
        assert (refusal.error.reason, refusal.error.metadata["quota_bytes"]) == ("HOST_MEMORY", str(MIB))
        for _ in range(UPLOADS - 1):  # their streams end; they go on until their time to live is over
            greedy.start_upload(mine[0].id, 10)[0].cancel()
        with greedy.append_call() as one_more:
            one_more.send(start_message(mine[0].id, 10))
            refusal = one_more.refusal()
        assert (refusal.error.reason, refusal.error.metadata["limit"]) == ("TOO_MANY", str(UPLOADS))
        theirs = other.create(KIND)
        few = keys[: len(keys) // 4]
        assert other.upload(KIND, theirs.id, few) == len(few)
        other.delete(theirs.id)
        for each in mine:
            greedy.delete(each.id)
