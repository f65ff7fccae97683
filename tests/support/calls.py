"""The service's calls through generated stubs, one message at a time where a test wants that."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from streamindex import status
from streamindex.checksum import crc32c
from streamindex.v1 import (
    attention_pb2_grpc,
    key_cache_pb2,
    key_cache_pb2_grpc,
    search_pb2,
    search_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    types_pb2,
)

from tests.support.tensors import Keys, Kind, Queries, encode

TIMEOUT_S = 60.0
RETRYABLE = {
    "UPLOAD_BUSY",
    "QUEUE_FULL",
    "DEADLINE_UNREACHABLE",
    "HOST_MEMORY",
    "DEVICE_MEMORY",
    "TOO_MANY",
    "WORKER_LOST",
    "NOT_READY",
    "DRAINING",
}
_END = object()
# A caller that does not read must be felt soon: no growth of the transport's windows.
_SMALL_WINDOWS = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]


@dataclass(frozen=True)
class Refusal:
    """How a call ended, from its status, its trailers and, on a stream, its last message."""

    code: grpc.StatusCode
    details: str
    error: types_pb2.Error
    in_band: types_pb2.Error | None
    trailers: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return f"{self.code.name}/{self.error.reason} {self.error.field}: {self.details} {dict(self.error.metadata)}"


def refusal_of(rpc_error: grpc.RpcError, in_band: types_pb2.Error | None = None) -> Refusal:
    """Read a refusal; whatever it is, its parts must agree and RetryInfo must be there exactly when it may be."""
    trailers = tuple((key, value) for key, value in rpc_error.trailing_metadata() or ())
    raw = dict(trailers).get(status.TRAILER)
    assert raw is not None, f"no details in the trailers of {rpc_error.code()}: {rpc_error.details()}"
    error = status.from_trailer(raw)
    assert error is not None
    assert error.code == rpc_error.code().value[0]
    assert error.message == rpc_error.details()
    assert error.HasField("retry_after_ms") == (error.reason in RETRYABLE)
    assert in_band is None or in_band == error
    return Refusal(rpc_error.code(), rpc_error.details(), error, in_band, trailers)


class StreamCall:
    """A bidirectional call: messages are sent and received when the test says so."""

    def __init__(self, method: Any, timeout_s: float | None = TIMEOUT_S, metadata: Any = None) -> None:
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.rpc = method(iter(self._outgoing.get, _END), timeout=timeout_s, metadata=metadata)

    def send(self, *messages: Any) -> None:
        for message in messages:
            self._outgoing.put(message)

    def half_close(self) -> None:
        self._outgoing.put(_END)

    def receive(self, kind: str) -> Any:
        """The next message, which must be of this kind."""
        message = next(self.rpc)
        assert message.WhichOneof("message") == kind, message
        return getattr(message, kind)

    def receive_until(self, kind: str) -> Any:
        """The next message of this kind; others are passed over."""
        for message in self.rpc:
            if message.WhichOneof("message") == kind:
                return getattr(message, kind)
        raise AssertionError(f"the stream ended without {kind}")

    def rest(self) -> list[Any]:
        return list(self.rpc)

    def refusal(self) -> Refusal:
        """Read to the end, which must be a refusal, in-band and as the status."""
        messages, error = self.to_the_end()
        last = messages[-1] if messages else None
        assert error is not None, f"the call succeeded; last message: {last}"
        assert last is not None, f"nothing in-band before {error.code()}: {error.details()}"
        assert last.WhichOneof("message") == "refused", last
        return refusal_of(error, last.refused)

    def to_the_end(self) -> tuple[list[Any], grpc.RpcError | None]:
        """All messages that still come, and the error that ends the call, if one does."""
        messages = []
        try:
            for message in self.rpc:
                messages.append(message)  # noqa: PERF402 (what came before an error counts)
        except grpc.RpcError as error:
            return messages, error
        return messages, None

    def cancel(self) -> None:
        self.rpc.cancel()
        self._outgoing.put(_END)

    def __enter__(self) -> StreamCall:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class Calls:
    """A connection and the calls on it."""

    def __init__(self, target: str, caller: str | None = None) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1), *_SMALL_WINDOWS]
        self.channel = grpc.insecure_channel(target, options=options)
        self.metadata = None if caller is None else (("x-caller", caller),)
        self.key_caches = key_cache_pb2_grpc.KeyCacheServiceStub(self.channel)
        self.searches = search_pb2_grpc.SearchServiceStub(self.channel)
        self.server = server_pb2_grpc.ServerServiceStub(self.channel)
        self.attention = attention_pb2_grpc.AttentionServiceStub(self.channel)
        self.health_stub = health_pb2_grpc.HealthStub(self.channel)

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Key caches.

    def create(self, kind: Kind, **others: Any) -> key_cache_pb2.KeyCache:
        request = key_cache_pb2.CreateKeyCacheRequest(spec=kind.spec(**others))
        return self.key_caches.CreateKeyCache(request, timeout=TIMEOUT_S, metadata=self.metadata).key_cache

    def get(self, cache_id: str) -> key_cache_pb2.KeyCache:
        request = key_cache_pb2.GetKeyCacheRequest(key_cache_id=cache_id)
        return self.key_caches.GetKeyCache(request, timeout=TIMEOUT_S, metadata=self.metadata).key_cache

    def list(self, **fields: Any) -> key_cache_pb2.ListKeyCachesResponse:
        request = key_cache_pb2.ListKeyCachesRequest(**fields)
        return self.key_caches.ListKeyCaches(request, timeout=TIMEOUT_S, metadata=self.metadata)

    def delete(self, cache_id: str) -> None:
        request = key_cache_pb2.DeleteKeyCacheRequest(key_cache_id=cache_id)
        self.key_caches.DeleteKeyCache(request, timeout=TIMEOUT_S, metadata=self.metadata)

    def truncate(self, cache_id: str, keys: int, layer: int | None = None) -> key_cache_pb2.KeyCache:
        request = key_cache_pb2.TruncateKeysRequest(key_cache_id=cache_id, keys=keys, layer=layer)
        return self.key_caches.TruncateKeys(request, timeout=TIMEOUT_S, metadata=self.metadata).key_cache

    def fork(self, cache_id: str, keys: int | None = None) -> key_cache_pb2.KeyCache:
        request = key_cache_pb2.ForkKeyCacheRequest(key_cache_id=cache_id, keys=keys)
        return self.key_caches.ForkKeyCache(request, timeout=TIMEOUT_S, metadata=self.metadata).key_cache

    def query_upload(self, upload_id: str) -> key_cache_pb2.QueryUploadResponse:
        request = key_cache_pb2.QueryUploadRequest(upload_id=upload_id)
        return self.key_caches.QueryUpload(request, timeout=TIMEOUT_S, metadata=self.metadata)

    @contextlib.contextmanager
    def cache(self, kind: Kind, rows: Keys | None = None, **others: Any) -> Iterator[key_cache_pb2.KeyCache]:
        """A cache for the length of a block, with rows in its layer 0."""
        cache = self.create(kind, **others)
        try:
            if rows is not None:
                self.upload(kind, cache.id, rows)
            yield cache
        finally:
            with contextlib.suppress(grpc.RpcError):  # the test may have deleted it
                self.delete(cache.id)

    # Uploads.

    def append_call(self, timeout_s: float | None = TIMEOUT_S) -> StreamCall:
        return StreamCall(self.key_caches.AppendKeys, timeout_s, self.metadata)

    def start_upload(
        self, cache_id: str, row_count: int, first_row: int = 0, layer: int = 0
    ) -> tuple[StreamCall, key_cache_pb2.UploadAccepted]:
        call = self.append_call()
        call.send(start_message(cache_id, row_count, first_row, layer))
        return call, call.receive("accepted")

    def resume_upload(self, upload_id: str) -> tuple[StreamCall, key_cache_pb2.UploadAccepted]:
        call = self.append_call()
        call.send(resume_message(upload_id))
        return call, call.receive("accepted")

    def upload(
        self, kind: Kind, cache_id: str, rows: Keys, first_row: int = 0, layer: int = 0, chunk_rows: int = 300
    ) -> int:
        """Write rows; the layer's length after that."""
        call, _ = self.start_upload(cache_id, len(rows), first_row, layer)
        with call:
            call.send(*key_chunks(kind, rows, chunk_rows), finish_message(kind, rows))
            call.half_close()
            keys = call.receive_until("committed").layer_keys
            assert not call.rest()
            return keys

    # Searches.

    def search_call(self, timeout_s: float | None = TIMEOUT_S) -> StreamCall:
        return StreamCall(self.searches.Search, timeout_s, self.metadata)

    def start_search(
        self, kind: Kind, cache_id: str, top_k: int, timeout_s: float | None = TIMEOUT_S, **header: Any
    ) -> StreamCall:
        """A search that is accepted."""
        call = self.search_call(timeout_s)
        call.send(search_header(kind, cache_id, top_k, **header))
        call.receive("accepted")
        return call

    def search(
        self, kind: Kind, cache_id: str, queries: Queries, top_k: int, chunk_rows: int = 64, **header: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """indices [rows, top_k] int32, scores [rows, top_k] float32 (of no rows when none were asked for)."""
        explicit = header.get("explicit_positions", False)
        if not explicit:
            header.setdefault("start_position", int(queries.positions[0]) if len(queries) else 0)
        call = self.search_call()
        with call:
            call.send(search_header(kind, cache_id, top_k, **header))
            call.send(*query_chunks(kind, queries, chunk_rows, explicit=explicit))
            call.half_close()
            messages = call.rest()
        assert messages[0].WhichOneof("message") == "accepted"
        assert messages[-1].done.row_count == len(queries)
        return answers([message.chunk for message in messages[1:-1]], top_k)

    # The server.

    def load(self) -> server_pb2.GetLoadResponse:
        return self.server.GetLoad(server_pb2.GetLoadRequest(), timeout=TIMEOUT_S)

    def ledger(self, name: str) -> server_pb2.Ledger:
        return next(ledger for ledger in self.load().ledgers if ledger.name == name)

    def capabilities(self) -> server_pb2.GetCapabilitiesResponse:
        return self.server.GetCapabilities(server_pb2.GetCapabilitiesRequest(), timeout=TIMEOUT_S)

    def wait_health(self, wanted: int) -> None:
        """Until the health service says so, which it tells by itself."""
        watch = self.health_stub.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        for response in watch:
            if response.status == wanted:
                watch.cancel()
                return
        raise AssertionError("the watch ended")


def refused(method: Any, *arguments: Any, **others: Any) -> Refusal:
    """A unary call that must be refused."""
    try:
        answer = method(*arguments, **others)
    except grpc.RpcError as error:
        return refusal_of(error)
    raise AssertionError(f"the call succeeded: {answer}")


def start_message(cache_id: str, row_count: int, first_row: int = 0, layer: int = 0) -> key_cache_pb2.AppendKeysRequest:
    start = key_cache_pb2.AppendKeysHeader.Start(
        key_cache_id=cache_id, layer=layer, first_row=first_row, row_count=row_count
    )
    return key_cache_pb2.AppendKeysRequest(header=key_cache_pb2.AppendKeysHeader(start=start))


def resume_message(upload_id: str) -> key_cache_pb2.AppendKeysRequest:
    return key_cache_pb2.AppendKeysRequest(header=key_cache_pb2.AppendKeysHeader(resume_upload_id=upload_id))


def key_chunk(kind: Kind, rows: Keys, at: int, **wrong: Any) -> key_cache_pb2.AppendKeysRequest:
    """One chunk; `wrong` replaces fields."""
    keys, scales = rows.key_bytes(kind), rows.scale_bytes(kind)
    fields = {
        "row_offset": at,
        "row_count": len(rows),
        "keys": keys,
        "scales": scales,
        "crc32c": crc32c(wrong.get("scales", scales), crc32c(wrong.get("keys", keys))),
        **wrong,
    }
    return key_cache_pb2.AppendKeysRequest(chunk=key_cache_pb2.KeyChunk(**fields))


def key_chunks(kind: Kind, rows: Keys, chunk_rows: int, first: int = 0) -> list[key_cache_pb2.AppendKeysRequest]:
    return [key_chunk(kind, rows[at : at + chunk_rows], at) for at in range(first, len(rows), chunk_rows)]


def finish_message(kind: Kind, rows: Keys, **wrong: Any) -> key_cache_pb2.AppendKeysRequest:
    fields = {
        "row_count": len(rows),
        "keys_crc32c": crc32c(rows.key_bytes(kind)),
        "scales_crc32c": crc32c(rows.scale_bytes(kind)) if kind.has_scales else None,
        **wrong,
    }
    return key_cache_pb2.AppendKeysRequest(finish=key_cache_pb2.AppendKeysFinish(**fields))


def search_header(kind: Kind, cache_id: str, top_k: int, **fields: Any) -> search_pb2.SearchRequest:
    if not fields.keys() & {"start_position", "explicit_positions"}:
        fields["start_position"] = 0
    header = {
        "key_cache_id": cache_id,
        "top_k": top_k,
        "query_format": kind.key_format,
        "convention": kind.convention,
        **fields,
    }
    return search_pb2.SearchRequest(header=search_pb2.SearchHeader(**header))


def query_chunk(
    kind: Kind, queries: Queries, first: int, count: int, *, explicit: bool = False, **wrong: Any
) -> search_pb2.SearchRequest:
    rows = slice(first, first + count)
    fields = {
        "row_offset": first,
        "row_count": len(queries.q[rows]),
        "q": encode(queries.q[rows], kind.key_format),
        "w": queries.w[rows].astype("<f4").tobytes(),
        "positions": queries.positions[rows].astype("<i8").tobytes() if explicit else b"",
        **wrong,
    }
    return search_pb2.SearchRequest(chunk=search_pb2.QueryChunk(**fields))


def query_chunks(
    kind: Kind, queries: Queries, chunk_rows: int, first: int = 0, *, explicit: bool = False
) -> list[search_pb2.SearchRequest]:
    return [
        query_chunk(kind, queries, at, chunk_rows, explicit=explicit) for at in range(first, len(queries), chunk_rows)
    ]


def batch_item(kind: Kind, cache_id: str, queries: Queries | None = None, append: Any = None, **others):
    """An item; `append` is (first row, keys), or the message."""
    fields = {"key_cache_id": cache_id, "query_format": kind.key_format, "convention": kind.convention}
    if queries is not None:
        fields |= {
            "row_count": len(queries),
            "q": encode(queries.q, kind.key_format),
            "w": queries.w.astype("<f4").tobytes(),
            "positions": [int(position) for position in queries.positions],
        }
    if isinstance(append, search_pb2.SearchBatchItem.Append):
        fields["append"] = append
    elif append is not None:
        first_row, rows = append
        fields["append"] = search_pb2.SearchBatchItem.Append(
            first_row=first_row, row_count=len(rows), keys=rows.key_bytes(kind), scales=rows.scale_bytes(kind)
        )
    return search_pb2.SearchBatchItem(**{**fields, **others})


def answers(chunks: list[search_pb2.IndexChunk], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Join answer chunks, which must be in order, whole, and have the checksums that they carry."""
    row = 0
    for chunk in chunks:
        assert chunk.row_offset == row
        assert len(chunk.indices) == chunk.row_count * top_k * 4
        assert chunk.crc32c == crc32c(chunk.scores, crc32c(chunk.indices))
        row += chunk.row_count
    indices = np.frombuffer(b"".join(chunk.indices for chunk in chunks), np.int32).reshape(-1, top_k)
    scores = np.frombuffer(b"".join(chunk.scores for chunk in chunks), np.float32).reshape(-1, top_k)
    return indices, scores
