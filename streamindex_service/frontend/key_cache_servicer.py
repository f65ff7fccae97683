"""The calls on key caches."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AbstractContextManager
from typing import Any

from streamindex.framing import Chunk
from streamindex.v1 import key_cache_pb2 as pb

from streamindex_service.core.layers import KeyCache
from streamindex_service.core.uploads import Upload
from streamindex_service.errors import InvalidArgumentError, MalformedMessageError, ServiceError
from streamindex_service.frontend import requests
from streamindex_service.frontend.identity import Identify
from streamindex_service.frontend.messages import MessageWriter, read_first
from streamindex_service.frontend.rpc import to_message
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.upload_stream import UploadStream

_MAX_PAGE = 1000


class KeyCacheServicer:
    """streamindex.v1.KeyCacheService."""

    def __init__(self, service: Service, identify: Identify) -> None:
        self._service = service
        self._identify = identify

    async def create(self, request: pb.CreateKeyCacheRequest, context: Any) -> pb.CreateKeyCacheResponse:
        """CreateKeyCache."""
        service = self._service
        most_bytes = int(service.caches.watermarks.critical * service.host.limit_bytes)
        spec = requests.cache_spec(request.spec, service.settings, service.formats, service.kv_formats, most_bytes)
        owner = self._identify(context)
        cache = await service.room.make(lambda: service.caches.create(owner, spec))
        return pb.CreateKeyCacheResponse(key_cache=to_key_cache(cache))

    async def get(self, request: pb.GetKeyCacheRequest, context: Any) -> pb.GetKeyCacheResponse:
        """GetKeyCache."""
        return pb.GetKeyCacheResponse(key_cache=to_key_cache(self._find(context, request.key_cache_id)))

    async def list(self, request: pb.ListKeyCachesRequest, context: Any) -> pb.ListKeyCachesResponse:
        """ListKeyCaches."""
        size = min(request.page_size or _MAX_PAGE, _MAX_PAGE)
        token = request.page_token or "0"
        if not (token.isascii() and token.isdigit() and len(token) <= 20):
            raise InvalidArgumentError("page_token is not one of this server's", field="page_token")
        found = self._service.caches.owned_by(self._identify(context), int(token), size + 1)
        more = len(found) > size
        page = found[:size]
        return pb.ListKeyCachesResponse(
            key_caches=[to_key_cache(cache) for cache in page], next_page_token=str(page[-1].created) if more else ""
        )

    async def delete(self, request: pb.DeleteKeyCacheRequest, context: Any) -> pb.DeleteKeyCacheResponse:
        """DeleteKeyCache."""
        self._service.delete_cache(self._find(context, request.key_cache_id))
        return pb.DeleteKeyCacheResponse()

    async def truncate(self, request: pb.TruncateKeysRequest, context: Any) -> pb.TruncateKeysResponse:
        """TruncateKeys."""
        cache = self._find(context, request.key_cache_id)
        layer = request.layer if request.HasField("layer") else None
        window_rows = request.window_rows if request.HasField("window_rows") else None
        self._service.caches.truncate(cache, request.keys, layer, window_rows)
        return pb.TruncateKeysResponse(key_cache=to_key_cache(cache))

    async def fork(self, request: pb.ForkKeyCacheRequest, context: Any) -> pb.ForkKeyCacheResponse:
        """ForkKeyCache."""
        caches, keys = self._service.caches, request.keys if request.HasField("keys") else None
        window_rows = request.window_rows if request.HasField("window_rows") else None
        with caches.kept(self._find(context, request.key_cache_id)):
            twin = await self._service.room.make(
                lambda: caches.fork(self._find(context, request.key_cache_id), keys, window_rows)
            )
        return pb.ForkKeyCacheResponse(key_cache=to_key_cache(twin))

    async def query_upload(self, request: pb.QueryUploadRequest, context: Any) -> pb.QueryUploadResponse:
        """QueryUpload."""
        upload = self._service.uploads.get(self._identify(context), request.upload_id)
        return pb.QueryUploadResponse(row_offset=upload.rows_held, committed=upload.committed)

    async def append(self, request_iterator: Any, context: Any) -> None:
        """AppendKeys."""
        stream: UploadStream | None = None
        limits = self._service.settings.limits
        writer = MessageWriter(context, limits.slow_consumer_s)
        try:
            self._service.admit()
            message = await read_first(context, limits.slow_consumer_s)
            with self._kept(message, context):
                upload = await self._service.room.make(lambda: self._open(message, context))
            stream = UploadStream(self._service, upload, context, writer)
            accepted = pb.UploadAccepted(
                upload_id=upload.upload_id,
                row_offset=upload.rows_held,
                max_chunk_bytes=int(limits.max_chunk_bytes),
                window_bytes=int(limits.upload_window_bytes),
            )
            await writer.write(pb.AppendKeysResponse(accepted=accepted))
            await stream.run()
        except ServiceError as error:
            await writer.refuse(pb.AppendKeysResponse(refused=to_message(error)))
            raise
        finally:
            if stream is not None:  # to its end, even when the call is cancelled in the middle of it
                await asyncio.shield(self._service.background(stream.close()))

    def _kept(self, message: Any, context: Any) -> AbstractContextManager[None]:
        """The cache of an upload that starts does not expire while that waits for memory."""
        if isinstance(message, pb.AppendKeysRequest) and message.header.WhichOneof("kind") == "start":
            return self._service.caches.kept(self._find(context, message.header.start.key_cache_id))
        return contextlib.nullcontext()

    def _open(self, message: Any, context: Any) -> Upload:
        if message is None or isinstance(message, Chunk) or message.WhichOneof("message") != "header":
            raise MalformedMessageError("the first message must be a header", field="header")
        header, owner = message.header, self._identify(context)
        uploads = self._service.uploads
        if header.WhichOneof("kind") == "resume_upload_id":
            upload = uploads.get(owner, header.resume_upload_id)
        elif header.WhichOneof("kind") == "start":
            start = header.start
            cache = self._service.caches.get(owner, start.key_cache_id)
            kind = requests.row_kind(start.row_kind)
            most = self._service.settings.limits.max_layer_keys
            upload = uploads.start(cache, start.layer, start.first_row, start.row_count, most, kind)
        else:
            raise InvalidArgumentError("header needs start or resume_upload_id", field="header.start")
        uploads.attach(upload)
        return upload

    def _find(self, context: Any, cache_id: str) -> KeyCache:
        return self._service.caches.get(self._identify(context), cache_id)


def to_key_cache(cache: KeyCache) -> pb.KeyCache:
    """A cache's state, as callers see it."""
    spec, kv = cache.spec, cache.spec.kv
    kv_spec = None
    if kv is not None:
        kv_spec = pb.KvSpec(
            kv_format=int(kv.kv_format),  # type: ignore[arg-type]
            key_dim=kv.key_dim,
            value_dim=kv.value_dim,
            heads=kv.heads,
        )
    return pb.KeyCache(
        id=cache.cache_id,
        spec=pb.KeyCacheSpec(
            heads=spec.heads,
            head_dim=spec.head_dim,
            ratio=spec.ratio,
            key_format=int(spec.key_format),  # type: ignore[arg-type]
            layers=spec.layers,
            convention=spec.convention,
            expected_keys=spec.expected_keys,
            idle_ttl_s=int(spec.idle_ttl_s),
            priority=spec.priority,  # type: ignore[arg-type]
            kv=kv_spec,
        ),
        layer_keys=[layer.length_keys for layer in cache.layers],
        layer_kv_rows=[layer.length_keys for layer in cache.kv_layers],
        layer_window_rows=[layer.length_keys for layer in cache.window_layers],
        host_bytes=cache.host_bytes,
        resident_bytes=cache.resident_bytes,
        spilled_bytes=cache.spilled_bytes,
    )
