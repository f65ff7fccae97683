"""The search calls: from a header to an admitted search, and back to where everything was."""

from __future__ import annotations

from typing import Any

from streamindex.v1 import search_pb2 as pb

from streamindex_service.errors import ServiceError
from streamindex_service.frontend import requests
from streamindex_service.frontend.admission import admit
from streamindex_service.frontend.identity import Identify
from streamindex_service.frontend.messages import MessageWriter, read_header
from streamindex_service.frontend.rpc import to_message
from streamindex_service.frontend.search_batch import BatchSearch
from streamindex_service.frontend.search_stream import SearchStream
from streamindex_service.frontend.service import Service


class SearchServicer:
    """streamindex.v1.SearchService."""

    def __init__(self, service: Service, identify: Identify) -> None:
        self._service = service
        self._identify = identify

    async def search(self, request_iterator: Any, context: Any) -> None:
        """Search."""
        limits = self._service.settings.limits
        writer = MessageWriter(context, limits.slow_consumer_s)
        try:
            self._service.admit()
            header: pb.SearchHeader = await read_header(context, limits.slow_consumer_s)
            owner = self._identify(context)
            cache = self._service.caches.get(owner, header.key_cache_id)
            parameters = requests.search_parameters(header, cache.spec, self._service.settings)
            key = requests.blame_key(owner, parameters.request_key, header)
            self._service.device.refuse_poison(key)
            opened = await admit(
                self._service,
                cache,
                header.layer,
                parameters,
                context.time_remaining,
                lambda version: requests.check_layer_version(header, version),
            )
            async with opened as admitted:
                accepted = pb.SearchAccepted(
                    layer_keys=admitted.snapshot.length_keys,
                    layer_version=admitted.snapshot.version,
                    implementation=self._service.require_worker_info().implementation,
                    max_chunk_bytes=int(limits.max_chunk_bytes),
                )
                await writer.write(pb.SearchResponse(accepted=accepted))
                stream = SearchStream(self._service, admitted, parameters, key, context, writer)
                admitted.users.append(stream)
                done = await stream.run()
            ended = pb.SearchDone(row_count=done.rows, device_us=done.device_us, queued_ms=done.queued_ms)
            await writer.write(pb.SearchResponse(done=ended))
        except ServiceError as error:
            await writer.refuse(pb.SearchResponse(refused=to_message(error)))
            raise

    async def search_batch(self, request: pb.SearchBatchRequest, context: Any) -> pb.SearchBatchResponse:
        """SearchBatch."""
        return await BatchSearch(self._service, self._identify(context), request, context.time_remaining).run()
