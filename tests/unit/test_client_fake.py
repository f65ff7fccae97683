"""A service in a thread pool that follows the contract and fails on request; and what the fake itself promises."""

from __future__ import annotations

import threading
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from streamindex import checksum, framing, status
from streamindex.v1 import key_cache_pb2, search_pb2, search_pb2_grpc, server_pb2, types_pb2

HEADS, HEAD_DIM = 2, 16
QUERY_ROW_BYTES = HEADS * HEAD_DIM * 2 + HEADS * 4


@dataclass
class Fault:
    """What happens to one stream, after so many chunks: `error` in-band or as a status, corruption, a lost end."""

    after: int = 0
    error: types_pb2.Error | None = None
    in_band: bool = False
    bare: bool = False
    corrupt: bool = False
    lose_end: bool = False
    hook: Any = None


def error(code: grpc.StatusCode, reason: str = "TEST", retry_ms: int | None = None, **metadata: str) -> types_pb2.Error:
    message = types_pb2.Error(code=code.value[0], reason=reason, message=f"{reason} on request", metadata=metadata)
    if retry_ms is not None:
        message.retry_after_ms = retry_ms
    return message


WORKER_LOST = error(grpc.StatusCode.UNAVAILABLE, "WORKER_LOST", 5)


@dataclass
class Upload:
    header: Any
    row_bytes: int
    keys: bytearray = field(default_factory=bytearray)
    scales: bytearray = field(default_factory=bytearray)
    committed: bool = False
    rows: int = 0


class FakeService:
    """One cache with a few layers; answers [position, first q word, w's first bits...] for every query row."""

    def __init__(self, address: str, *, max_chunk_bytes: int = 4096, window_bytes: int = 16384) -> None:
        self.address = address
        self.max_chunk_bytes, self.window_bytes = max_chunk_bytes, window_bytes
        self.spec = key_cache_pb2.KeyCacheSpec()
        self.layers: dict[int, bytes] = {}
        self.lengths: list[int] = []
        self.uploads: dict[str, Upload] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.calls: list[tuple[str, Any]] = []
        self.chunk_rows: list[tuple[int, int]] = []  # of uploads, as they came
        self.search_headers: list[Any] = []
        self.rows_received = 0
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        self.server = grpc.server(futures.ThreadPoolExecutor(16))
        self.server.add_generic_rpc_handlers([self._handlers()])
        assert self.server.add_insecure_port(self.address)
        self.server.start()

    def stop(self) -> None:
        self.server.stop(0).wait()

    def _handlers(self) -> grpc.GenericRpcHandler:
        outer = self

        class Handlers(grpc.GenericRpcHandler):
            def service(self, details: Any) -> Any:
                name = details.method.rsplit("/", 1)[1]
                if name == "AppendKeys":
                    return grpc.stream_stream_rpc_method_handler(outer.append)
                if name == "Search":
                    return grpc.stream_stream_rpc_method_handler(outer.search)
                if name == "WatchLoad":
                    return grpc.unary_stream_rpc_method_handler(outer.watch)
                return grpc.unary_unary_rpc_method_handler(lambda data, context: outer.unary(name, data, context))

        return Handlers()

    def next_fault(self, name: str) -> Fault | None:
        with self.lock:
            queue = self.faults.get(name)
            return queue.pop(0) if queue else None

    def fail(self, context: Any, fault: Fault) -> None:
        assert fault.error is not None
        code = next(each for each in grpc.StatusCode if each.value[0] == fault.error.code)
        if not fault.bare:
            context.set_trailing_metadata(((status.TRAILER, status.to_trailer(fault.error)),))
        context.abort(code, fault.error.message)

    # --- unary ---

    def unary(self, name: str, data: bytes, context: Any) -> bytes:
        fault = self.next_fault(name)
        if fault is not None and fault.hook is not None:
            fault.hook()
        if fault is not None and fault.error is not None and not fault.lose_end:
            self.calls.append((name, None))
            self.fail(context, fault)
        pb = search_pb2 if name == "SearchBatch" else server_pb2 if name in ("GetLoad", "GetCapabilities") else None
        request = getattr(pb or key_cache_pb2, f"{name}Request").FromString(data)
        self.calls.append((name, request))
        answer = getattr(self, name)(request)
        if fault is not None and fault.error is not None:
            self.fail(context, fault)
        return answer.SerializeToString()

    def cache(self) -> key_cache_pb2.KeyCache:
        return key_cache_pb2.KeyCache(id="cache-1", spec=self.spec, layer_keys=self.lengths)

    def CreateKeyCache(self, request: Any) -> Any:
        self.spec.CopyFrom(request.spec)
        self.lengths = [0] * self.spec.layers
        return key_cache_pb2.CreateKeyCacheResponse(key_cache=self.cache())

    def GetKeyCache(self, request: Any) -> Any:
        return key_cache_pb2.GetKeyCacheResponse(key_cache=self.cache())

    def ListKeyCaches(self, request: Any) -> Any:
        token = "" if request.page_token else "more"
        return key_cache_pb2.ListKeyCachesResponse(key_caches=[self.cache()], next_page_token=token)

    def DeleteKeyCache(self, request: Any) -> Any:
        return key_cache_pb2.DeleteKeyCacheResponse()

    def TruncateKeys(self, request: Any) -> Any:
        layers = [request.layer] if request.HasField("layer") else range(len(self.lengths))
        for layer in layers:
            self.lengths[layer] = min(self.lengths[layer], request.keys)
        return key_cache_pb2.TruncateKeysResponse(key_cache=self.cache())

    def ForkKeyCache(self, request: Any) -> Any:
        return key_cache_pb2.ForkKeyCacheResponse(key_cache=self.cache())

    def QueryUpload(self, request: Any) -> Any:
        upload = self.uploads[request.upload_id]
        return key_cache_pb2.QueryUploadResponse(row_offset=upload.rows, committed=upload.committed)

    def GetLoad(self, request: Any) -> Any:
        ledger = server_pb2.Ledger(name="hbm", limit_bytes=9, reserved_bytes=1, peak_bytes=2)
        residency = server_pb2.KeyCacheResidency(device=1, partial=2, none=3, spilled=4)
        return server_pb2.GetLoadResponse(
            ready=not self.faults.get("ready"), ledgers=[ledger], uptime_ms=7, residency=residency
        )

    def watch(self, data: bytes, context: Any) -> Any:
        self.calls.append(("WatchLoad", server_pb2.WatchLoadRequest.FromString(data)))
        fault = self.next_fault("WatchLoad") or Fault(after=5)
        for _ in range(fault.after):
            yield server_pb2.WatchLoadResponse(load=self.GetLoad(None)).SerializeToString()
        if fault.corrupt:
            yield b"\xff"
        if fault.error is not None:
            self.fail(context, fault)

    def GetCapabilities(self, request: Any) -> Any:
        limits = server_pb2.Limits(max_heads=128, max_top_k=4096)
        one = server_pb2.Implementation(name="chunked", key_formats=[1, 99], repeatable=True)
        return server_pb2.GetCapabilitiesResponse(
            device="cpu", implementation="chunked", implementations=[one], key_formats=[1, 2], limits=limits
        )

    def SearchBatch(self, request: Any) -> Any:
        results = []
        for item in request.items:
            if item.append.row_count:
                self.lengths[item.layer] = item.append.first_row + item.append.row_count
            if item.layer == 1:
                results.append(search_pb2.SearchBatchResult(layer_keys=3, error=error(grpc.StatusCode.NOT_FOUND)))
                continue
            rows, top_k = item.row_count, request.top_k
            indices, scores = answers(np.frombuffer(item.q, "<u2"), item.w, list(item.positions), rows, top_k)
            results.append(
                search_pb2.SearchBatchResult(
                    indices=indices.tobytes(),
                    scores=scores.tobytes() if request.want_scores else b"",
                    layer_keys=self.lengths[item.layer],
                )
            )
        return search_pb2.SearchBatchResponse(results=results)

    # --- streams ---

    def append(self, requests: Any, context: Any) -> Any:
        fault = self.next_fault("AppendKeys") or Fault(after=1 << 60)
        header = framing.parse_append_keys_request(next(requests)).header
        if header.WhichOneof("kind") == "start":
            upload_id = f"upload-{len(self.uploads)}"
            element = {1: 2, 2: 2, 3: 4, 4: 1}[self.spec.key_format]
            self.uploads[upload_id] = Upload(header.start, self.spec.head_dim * element)
        else:
            upload_id = header.resume_upload_id
        upload = self.uploads[upload_id]
        accepted = key_cache_pb2.UploadAccepted(
            upload_id=upload_id,
            row_offset=upload.rows,
            max_chunk_bytes=self.max_chunk_bytes,
            window_bytes=self.window_bytes,
        )
        yield key_cache_pb2.AppendKeysResponse(accepted=accepted).SerializeToString()
        for chunks, data in enumerate(requests):
            message = framing.parse_append_keys_request(data)
            if not isinstance(message, framing.Chunk):
                yield from self._finish(upload, message.finish, fault, context)
                return
            if chunks == fault.after and fault.error is not None:
                if fault.in_band:
                    yield key_cache_pb2.AppendKeysResponse(refused=fault.error).SerializeToString()
                if fault.hook is not None:
                    fault.hook()
                self.fail(context, fault)
            keys, scales = message.parts
            assert message.row_offset == upload.rows, "a gap"
            assert len(keys) + len(scales) <= self.max_chunk_bytes
            assert message.crc32c == checksum.crc32c(bytes(keys) + bytes(scales))
            upload.keys += keys
            upload.scales += scales
            upload.rows += message.row_count
            assert len(upload.keys) == upload.rows * upload.row_bytes
            self.chunk_rows.append((message.row_offset, message.row_count))
            acknowledged = key_cache_pb2.UploadAcknowledged(row_offset=upload.rows)
            yield key_cache_pb2.AppendKeysResponse(acknowledged=acknowledged).SerializeToString()

    def _finish(self, upload: Upload, finish: Any, fault: Fault, context: Any) -> Any:
        assert finish.row_count == upload.rows == upload.header.row_count
        assert finish.keys_crc32c == checksum.crc32c(upload.keys)
        assert finish.HasField("scales_crc32c") == bool(upload.scales)
        assert not upload.scales or finish.scales_crc32c == checksum.crc32c(upload.scales)
        layer, first = upload.header.layer, upload.header.first_row
        upload.committed = True
        self.layers[layer] = self.layers.get(layer, b"")[: first * upload.row_bytes] + bytes(upload.keys)
        self.lengths[layer] = max(self.lengths[layer], first + upload.rows)
        if fault.lose_end:
            self.fail(context, fault)
        committed = key_cache_pb2.UploadCommitted(layer_keys=self.lengths[layer])
        yield key_cache_pb2.AppendKeysResponse(committed=committed).SerializeToString()

    def search(self, requests: Any, context: Any) -> Any:
        fault = self.next_fault("Search") or Fault(after=1 << 60)
        header = framing.parse_search_request(next(requests)).header
        self.search_headers.append(header)
        accepted = search_pb2.SearchAccepted(layer_keys=5, implementation="fake", max_chunk_bytes=self.max_chunk_bytes)
        if fault.error is not None and fault.in_band:
            yield search_pb2.SearchResponse(refused=fault.error).SerializeToString()
            self.fail(context, fault)
        yield search_pb2.SearchResponse(accepted=accepted).SerializeToString()
        rows = 0
        for chunks, data in enumerate(requests):
            chunk = framing.parse_search_request(data)
            if chunks == fault.after and fault.error is not None:
                self.fail(context, fault)
            q, w, positions = chunk.parts
            assert chunk.row_offset == rows
            assert chunk.crc32c == checksum.crc32c(bytes(q) + bytes(w) + bytes(positions))
            assert len(positions) == (8 * chunk.row_count if header.explicit_positions else 0)
            start = header.start_position + rows
            where = np.frombuffer(positions, "<i8").tolist() or list(range(start, start + chunk.row_count))
            indices, scores = answers(np.frombuffer(q, "<u2"), w, where, chunk.row_count, header.top_k)
            yield from self._answer(rows, indices, scores, header.want_scores, fault.corrupt and chunks == fault.after)
            rows += chunk.row_count
            with self.lock:
                self.rows_received += chunk.row_count
        assert header.row_count in (0, rows)
        if fault.lose_end:
            self.fail(context, fault)
        done = search_pb2.SearchDone(row_count=rows, device_us=10, queued_ms=1)
        yield search_pb2.SearchResponse(done=done).SerializeToString()

    def _answer(self, row: int, indices: Any, scores: Any, want_scores: bool, corrupt: bool) -> Any:
        """Two answers for each chunk where it has two rows, so that answers and queries do not line up."""
        middle = (len(indices) + 1) // 2
        for part in (slice(0, middle), slice(middle, None)):
            if not len(indices[part]):
                continue
            first, second = indices[part].tobytes(), scores[part].tobytes() if want_scores else b""
            crc = checksum.crc32c(second, checksum.crc32c(first))
            if corrupt and part.start == 0:
                first = bytes([first[0] ^ 1]) + first[1:]
            yield framing.encode_index_chunk(row + (part.start or 0), len(indices[part]), first, second, crc)


def answers(q: Any, w: Any, positions: list[int], rows: int, top_k: int) -> tuple[Any, Any]:
    indices = np.full((rows, top_k), -1, np.int32)
    scores = np.full((rows, top_k), -np.inf, np.float32)
    if not rows:
        return indices, scores
    indices[:, 0] = positions
    indices[:, 1] = q.reshape(rows, -1)[:, 0]
    scores[:, 0] = np.frombuffer(w, "<f4").reshape(rows, -1)[:, 0]
    return indices, scores


@pytest.fixture
def fake(tmp_path):
    service = FakeService(f"unix://{tmp_path}/s.sock")
    yield service
    service.stop()


def test_an_ordinary_protobuf_client_is_answered(fake):
    header = search_pb2.SearchHeader(top_k=4, start_position=9)
    chunk = search_pb2.QueryChunk(row_count=1, q=b"\x07\0" * 32, w=b"\0" * 8)
    chunk.crc32c = checksum.crc32c(chunk.q + chunk.w)
    with grpc.insecure_channel(fake.address) as channel:
        stub = search_pb2_grpc.SearchServiceStub(channel)
        requests = [search_pb2.SearchRequest(header=header), search_pb2.SearchRequest(chunk=chunk)]
        accepted, answer, done = stub.Search(iter(requests))
    assert accepted.accepted.implementation == "fake"
    assert np.frombuffer(answer.chunk.indices, "<i4").tolist() == [9, 7, -1, -1]
    assert done.done.row_count == 1
