"""What the server says of itself, and what surrounds every call."""

from __future__ import annotations

import os
import re
import stat

import grpc
import pytest
import streamindex_client
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from streamindex.v1 import attention_pb2, key_cache_pb2, server_pb2, types_pb2

from streamindex_service.core.band_queue import Band, Turn
from streamindex_service.core.scheduler import Scheduler
from tests.support.calls import Calls, StreamCall, refused, search_header
from tests.support.services import wait_for
from tests.support.tensors import Draw, Kind, expected

KIND = Kind(heads=2, head_dim=32)
SERVICES = {f"streamindex.v1.{name}Service" for name in ("KeyCache", "Search", "Attention", "Server")}


def test_reserved_calls_are_unimplemented(calls):
    with StreamCall(calls.attention.Attend) as call:
        call.send(attention_pb2.AttendRequest())
        with pytest.raises(grpc.RpcError) as caught:
            next(call.rpc)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_method_that_is_in_no_contract(calls):
    with pytest.raises(grpc.RpcError) as caught:
        calls.channel.unary_unary("/streamindex.v1.KeyCacheService/Nonsense")(b"", timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_reflection_lists_the_services(calls):
    stub = reflection_pb2_grpc.ServerReflectionStub(calls.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(stub.ServerReflectionInfo(iter([request]), timeout=30))
    listed = {service.name for service in answer.list_services_response.service}
    assert listed == SERVICES | {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_reflection_describes_what_it_lists(calls):
    stub = reflection_pb2_grpc.ServerReflectionStub(calls.channel)
    for name in sorted(SERVICES):
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
        answer = next(stub.ServerReflectionInfo(iter([request]), timeout=30))
        assert answer.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize("service", ["", *sorted(SERVICES)])
def test_health(calls, service):
    request = health_pb2.HealthCheckRequest(service=service)
    assert calls.health_stub.Check(request, timeout=30).status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_a_service_that_is_not_there(calls):
    with pytest.raises(grpc.RpcError) as caught:
        calls.health_stub.Check(health_pb2.HealthCheckRequest(service="x"), timeout=30)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("sent", "comes_back"),
    [("job-17.step:3_a", True), ("a" * 64, True), ("a" * 65, False), ("two words", False), ("", False)],
)
def test_request_ids_come_back_when_they_are_harmless(calls, sent, comes_back):
    request = key_cache_pb2.ListKeyCachesRequest()
    _, call = calls.key_caches.ListKeyCaches.with_call(request, metadata=(("x-request-id", sent),), timeout=30)
    echoed = dict(call.initial_metadata())["x-request-id"]
    assert (echoed == sent) == comes_back
    assert 1 <= len(echoed) <= 64


def test_every_call_has_a_request_id_refused_ones_too(calls):
    seen = set()
    for _ in range(3):
        with StreamCall(calls.searches.Search) as call:
            call.send(search_header(KIND, "kc_nowhere", 5))
            seen.add(dict(call.rpc.initial_metadata())["x-request-id"])
            call.refusal()
    assert len(seen) == 3


def test_capabilities(calls):
    found = calls.capabilities()
    assert (found.device, found.implementation) == ("cpu", "chunked")
    by_name = {implementation.name: implementation for implementation in found.implementations}
    assert set(by_name[found.implementation].key_formats) == set(found.key_formats)
    assert types_pb2.KEY_FORMAT_BF16 in found.key_formats
    assert (found.limits.max_heads, found.limits.max_head_dim, found.limits.max_top_k) == (128, 256, 4096)
    assert found.limits.max_given_indices == 16_384
    assert list(found.search_modes) == [types_pb2.SEARCH_MODE_EXACT]


def test_load_names_every_ledger(calls):
    load = calls.load()
    assert [ledger.name for ledger in load.ledgers] == ["hbm", "host", "ingress"]
    for ledger in load.ledgers:
        assert ledger.reserved_bytes <= ledger.peak_bytes <= ledger.limit_bytes
    assert load.ready
    assert load.uptime_ms > 0


def test_load_tells_what_the_device_has_done(calls):
    keys = Draw(3).keys(KIND, 600)
    before = calls.load()
    with calls.cache(KIND, keys) as cache:
        calls.search(KIND, cache.id, Draw(4).queries(KIND, 10, start_position=600), 20)
        after = calls.load()
    assert after.device.tiles_done > before.device.tiles_done
    assert after.device.busy_us > before.device.busy_us
    assert after.device.promoted_pages >= before.device.promoted_pages + 3
    assert after.device.resident_bytes >= 600 * KIND.row_bytes
    assert 0 < after.device.run.p50_us <= after.device.run.p99_us
    assert [band.priority for band in after.queue.bands] == [1, 2, 3]
    assert (after.queue.tiles, after.device.tiles, list(after.queue.callers)) == (0, 0, [])


def test_the_load_is_watched(calls):
    watching = calls.server.WatchLoad(server_pb2.WatchLoadRequest(interval_ms=100), timeout=30)
    seen = [next(watching).load for _ in range(3)]
    watching.cancel()
    assert all(load.ready for load in seen)
    assert seen[0].uptime_ms + 150 < seen[2].uptime_ms


@pytest.mark.parametrize("interval_ms", [1, 99, 60_001])
def test_an_interval_out_of_its_limits(calls, interval_ms):
    request = server_pb2.WatchLoadRequest(interval_ms=interval_ms)
    refusal = refused(lambda: next(calls.server.WatchLoad(request, timeout=30)))
    assert (refusal.code, refusal.error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "interval_ms")


def test_as_many_watch_as_may(inside):
    limit = inside.server.settings.server.max_watchers
    with Calls(inside.target) as calls:
        watching = [calls.server.WatchLoad(server_pb2.WatchLoadRequest(), timeout=60) for _ in range(limit)]
        for each in watching:
            next(each)
        refusal = refused(lambda: next(calls.server.WatchLoad(server_pb2.WatchLoadRequest(), timeout=30)))
        assert (refusal.error.reason, refusal.error.metadata["limit"]) == ("TOO_MANY", str(limit))
        for each in watching:
            each.cancel()

        def one_more() -> bool:
            watcher = calls.server.WatchLoad(server_pb2.WatchLoadRequest(), timeout=30)
            try:
                return bool(next(watcher).load.uptime_ms)
            except grpc.RpcError:
                return False
            finally:
                watcher.cancel()

        wait_for(one_more)


def test_callers_see_no_other_callers_name(inside):
    """Two with work in the queue: each sees its own name, and a label for the other, the same each time."""
    service = inside.server.service

    def queue_of(caller: str) -> dict[str, bool]:
        with Calls(inside.target, caller) as calls:
            load = calls.server.GetLoad(server_pb2.GetLoadRequest(), timeout=30, metadata=calls.metadata)
        return {each.caller: each.own for each in load.queue.callers}

    # Not from long ago: the service looks for tiles that have waited too long, and these are none of a search.
    turns = [Turn(name, Band.BATCH, 1.0, 1, service.clock()) for name in ("mine", "theirs")]
    scheduler = Scheduler(service.governor.limits.queue)
    for each in turns:
        scheduler.add(each)
    before = service.governor.scheduler
    inside.run(lambda: setattr(service.governor, "scheduler", scheduler))
    try:
        mine, theirs, again = queue_of("mine"), queue_of("theirs"), queue_of("mine")
    finally:
        inside.run(lambda: setattr(service.governor, "scheduler", before))
    assert mine == again
    assert (mine["mine"], theirs["theirs"]) == (True, True)
    (label,) = set(mine) - {"mine"}
    assert re.fullmatch("caller-[0-9a-f]{12}", label)
    assert not mine[label]
    assert label not in theirs


def test_the_client_watches_and_goes(roomy_service):
    with streamindex_client.connect(roomy_service.address) as client:
        watching = client.watch_load(interval_s=0.1, timeout=60)
        first, second = next(watching), next(watching)
        assert second.uptime_ms > first.uptime_ms > 0
        watching.close()
        assert client.load().ready


def test_tcp_and_unix_reach_one_service(roomy_service, calls):
    keys = Draw(1).keys(KIND, 300)
    queries = Draw(2).queries(KIND, 10, start_position=290)
    with Calls(roomy_service.tcp_address) as over_tcp, calls.cache(KIND) as cache:
        over_tcp.upload(KIND, cache.id, keys)
        wanted, _ = expected(KIND, keys, queries, 20)
        for connection in (calls, over_tcp):
            found, _ = connection.search(KIND, cache.id, queries, 20)
            assert (found == wanted).all()


def test_the_socket_is_its_owners_alone(roomy_service):
    mode = os.stat(roomy_service.socket_path).st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
