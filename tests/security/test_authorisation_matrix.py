"""Every method of every descriptor, for every kind of caller. A method that is not in the matrix fails here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from streamindex import status
from streamindex.v1 import attention_pb2, key_cache_pb2, search_pb2, server_pb2

from streamindex_service.frontend.tokens import new_token
from tests.support.calls import Calls, batch_item, search_header, start_message
from tests.support.inprocess import InProcessServer
from tests.support.services import ROOMY
from tests.support.tensors import Draw, Kind

KIND = Kind(heads=2, head_dim=32)
MODULES = (attention_pb2, key_cache_pb2, search_pb2, server_pb2, health_pb2, reflection_pb2)
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
OK, DENIED, NOBODY = "OK", "PERMISSION_DENIED", "UNAUTHENTICATED"
HIDDEN, RESERVED = "NOT_FOUND", "UNIMPLEMENTED"
NO_ROWS = "FAILED_PRECONDITION"  # the owner's cache holds index keys alone
CALLERS = ("nobody", "wrong secret", "unknown id", "another scheme", "owner", "other")


@dataclass(frozen=True)
class Row:
    """`request` of (cache id, upload id); codes for the owner of both, and for another caller who is known.

    `is_open`: anybody may call. `seen` tells of the answer whether it shows anything of the owner's.
    """

    request: Callable[[str, str], Message]
    owner: str = OK
    other: str = OK
    is_open: bool = False
    seen: Callable[[Any, str], bool] | None = None


def batch(cache_id: str, upload_id: str) -> Message:
    item = batch_item(KIND, cache_id, Draw(1).queries(KIND, 1))
    return search_pb2.SearchBatchRequest(items=[item], top_k=4)


def attend(cache_id: str, upload_id: str) -> Message:
    header = attention_pb2.SparseAttendHeader(key_cache_id=cache_id, given_indices=1, start_position=0, scale=1.0)
    return attention_pb2.SparseAttendRequest(header=header)


def attend_batch(cache_id: str, upload_id: str) -> Message:
    item = attention_pb2.SparseAttendBatchItem(key_cache_id=cache_id)
    return attention_pb2.SparseAttendBatchRequest(items=[item], given_indices=1, scale=1.0)


CACHES, SEARCH = "/streamindex.v1.KeyCacheService/", "/streamindex.v1.SearchService/"
ATTENTION, SERVER = "/streamindex.v1.AttentionService/", "/streamindex.v1.ServerService/"
HEALTH, REFLECTION = "/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/"
MATRIX = {
    CACHES + "CreateKeyCache": Row(lambda cache, upload: key_cache_pb2.CreateKeyCacheRequest(spec=KIND.spec())),
    CACHES + "GetKeyCache": Row(
        lambda cache, upload: key_cache_pb2.GetKeyCacheRequest(key_cache_id=cache), other=HIDDEN
    ),
    CACHES + "ListKeyCaches": Row(
        lambda cache, upload: key_cache_pb2.ListKeyCachesRequest(),
        seen=lambda answer, cache: cache in {each.id for each in answer.key_caches},
    ),
    CACHES + "DeleteKeyCache": Row(
        lambda cache, upload: key_cache_pb2.DeleteKeyCacheRequest(key_cache_id=cache), other=HIDDEN
    ),
    CACHES + "TruncateKeys": Row(
        lambda cache, upload: key_cache_pb2.TruncateKeysRequest(key_cache_id=cache, keys=0), other=HIDDEN
    ),
    CACHES + "ForkKeyCache": Row(
        lambda cache, upload: key_cache_pb2.ForkKeyCacheRequest(key_cache_id=cache), other=HIDDEN
    ),
    CACHES + "QueryUpload": Row(lambda cache, upload: key_cache_pb2.QueryUploadRequest(upload_id=upload), other=HIDDEN),
    CACHES + "AppendKeys": Row(lambda cache, upload: start_message(cache, 10), other=HIDDEN),
    SEARCH + "Search": Row(lambda cache, upload: search_header(KIND, cache, 4), other=HIDDEN),
    SEARCH + "SearchBatch": Row(batch, seen=lambda answer, cache: answer.results[0].error.reason != "CACHE_NOT_FOUND"),
    ATTENTION + "SparseAttend": Row(attend, owner=NO_ROWS, other=HIDDEN),
    ATTENTION + "SparseAttendBatch": Row(
        attend_batch, seen=lambda answer, cache: answer.results[0].error.reason != "CACHE_NOT_FOUND"
    ),
    ATTENTION + "Attend": Row(lambda cache, upload: attention_pb2.AttendRequest(), RESERVED, RESERVED),
    SERVER + "GetCapabilities": Row(lambda cache, upload: server_pb2.GetCapabilitiesRequest()),
    SERVER + "GetLoad": Row(lambda cache, upload: server_pb2.GetLoadRequest()),
    SERVER + "WatchLoad": Row(lambda cache, upload: server_pb2.WatchLoadRequest()),
    HEALTH + "Check": Row(lambda cache, upload: health_pb2.HealthCheckRequest(), is_open=True),
    HEALTH + "Watch": Row(lambda cache, upload: health_pb2.HealthCheckRequest(), is_open=True),
    REFLECTION + "ServerReflectionInfo": Row(
        lambda cache, upload: reflection_pb2.ServerReflectionRequest(list_services="")
    ),
}


@pytest.fixture(scope="module")
def tokens() -> dict[str, tuple[str, str]]:
    return {name: new_token(name) for name in ("owner", "other", "stranger")}


@pytest.fixture(scope="module")
def server(tokens, tmp_path_factory) -> Iterator[InProcessServer]:
    file = tmp_path_factory.mktemp("auth") / "tokens"
    file.write_text("\n".join(tokens[name][1] for name in ("owner", "other")))
    with InProcessServer({**ROOMY, "auth": {"token_file": str(file)}}, identify=None) as running:
        yield running


@pytest.fixture
def credentials(tokens) -> dict[str, Any]:
    owner = tokens["owner"][0]
    headers = {
        "nobody": None,
        "wrong secret": f"Bearer {owner[:-4]}AAAA",
        "unknown id": f"Bearer {tokens['stranger'][0]}",
        "another scheme": f"Basic {owner}",
        "owner": f"Bearer {owner}",
        "other": f"bearer {tokens['other'][0]}",
    }
    return {name: value and (("authorization", value),) for name, value in headers.items()}


@pytest.fixture
def owned(server, credentials) -> Iterator[tuple[str, str]]:
    """A cache and an open upload of the owner's."""
    with Calls(server.target) as calls:
        calls.metadata = credentials["owner"]
        with calls.cache(KIND, Draw(1).keys(KIND, 20)) as cache:
            call, accepted = calls.start_upload(cache.id, 10, first_row=20)
            with call:
                call.half_close()
                call.rest()
            yield cache.id, accepted.upload_id


def outcome(channel: grpc.Channel, path: str, request: Message, metadata: Any) -> tuple[str, Any, list[Any]]:
    """The status by name, the first answer, the trailers' details. A stream that has answered is ended: OK."""
    method = METHODS[path]
    kind = ("stream" if method.client_streaming else "unary") + "_" + ("stream" if method.server_streaming else "unary")
    make = getattr(channel, kind)
    call = make(
        path,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=method.output_type._concrete_class.FromString,
    )
    argument = iter([request]) if method.client_streaming else request
    try:
        answer = call(argument, timeout=20, metadata=metadata)
        if not method.server_streaming:
            return OK, answer, []
        if path.endswith(("/Watch", "/WatchLoad")):
            first = next(answer)
            answer.cancel()
            return OK, first, []
        messages = list(answer)
        return OK, messages[0] if messages else None, []
    except grpc.RpcError as error:
        details = dict(error.trailing_metadata() or ()).get(status.TRAILER)
        return error.code().name, None, [] if details is None else [status.from_trailer(details)]


def test_the_matrix_has_every_method_and_no_other():
    assert MATRIX.keys() == METHODS.keys()


@pytest.mark.parametrize(("path", "caller"), list(itertools.product(MATRIX, CALLERS)))
def test_who_may_call_what(server, credentials, owned, path, caller):
    row = MATRIX[path]
    expected = {"nobody": NOBODY, "owner": row.owner, "other": row.other}.get(caller, DENIED)
    if row.is_open:
        expected = row.owner
    with grpc.insecure_channel(server.target) as channel:
        code, answer, details = outcome(channel, path, row.request(*owned), credentials[caller])
    assert code == expected, (path, caller)
    if code in (NOBODY, DENIED):
        (error,) = details
        assert error.reason == code
        assert not error.HasField("retry_after_ms")
    if code == OK and row.seen is not None:
        assert row.seen(answer, owned[0]) == (caller == "owner")


def test_a_refusal_comes_in_band_too(server, credentials, owned):
    with Calls(server.target) as calls:
        for call, message in (
            (calls.append_call(), start_message(owned[0], 10)),
            (calls.search_call(), search_header(KIND, owned[0], 4)),
        ):
            with call:
                call.send(message)
                assert call.refusal().error.reason == NOBODY


def test_only_one_credential_at_a_time(server, credentials, tokens):
    with Calls(server.target) as calls:
        calls.metadata = (*credentials["owner"], *credentials["other"])
        with pytest.raises(grpc.RpcError) as caught:
            calls.get("x")
    assert caught.value.code().name == DENIED


def test_a_foreign_cache_looks_like_none_at_all(server, credentials, owned):
    texts = set()
    for cache_id in (owned[0], "0" * len(owned[0]), "", "x"):
        with Calls(server.target) as calls:
            calls.metadata = credentials["other"]
            with pytest.raises(grpc.RpcError) as caught:
                calls.get(cache_id)
        trailers = tuple(pair for pair in caught.value.trailing_metadata() if pair[0] == status.TRAILER)
        texts.add((caught.value.code(), caught.value.details(), trailers))
    assert len(texts) == 1
