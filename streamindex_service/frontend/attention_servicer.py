"""The calls of attention: from a header to an admitted call, and back to where everything was."""

from __future__ import annotations

from typing import Any

from streamindex.v1 import attention_pb2 as pb

from streamindex_service.errors import ServiceError
from streamindex_service.frontend import requests
from streamindex_service.frontend.attend_admission import admit_attention
from streamindex_service.frontend.attend_batch import BatchAttention
from streamindex_service.frontend.attend_requests import attend_parameters
from streamindex_service.frontend.attend_stream import AttendStream
from streamindex_service.frontend.identity import Identify
from streamindex_service.frontend.messages import MessageWriter, read_header
from streamindex_service.frontend.rpc import to_message
from streamindex_service.frontend.service import Service


class AttentionServicer:
    """streamindex.v1.AttentionService, as far as this version has it."""

    def __init__(self, service: Service, identify: Identify) -> None:
        self._service = service
        self._identify = identify

    async def sparse_attend(self, request_iterator: Any, context: Any) -> None:
        """SparseAttend."""
        service, limits = self._service, self._service.settings.limits
        writer = MessageWriter(context, limits.slow_consumer_s)
        try:
            service.admit()
            header: pb.SparseAttendHeader = await read_header(context, limits.slow_consumer_s)
            owner = self._identify(context)
            cache = service.caches.get(owner, header.key_cache_id)
            parameters = attend_parameters(header, cache.spec, service.settings)
            key = requests.blame_key(owner, parameters.request_key, header)
            service.device.refuse_poison(key)
            opened = await admit_attention(
                service,
                cache,
                header.layer,
                parameters,
                context.time_remaining,
                lambda version: requests.check_layer_version(header, version),
            )
            async with opened as admitted:
                accepted = pb.SparseAttendAccepted(
                    layer_keys=admitted.keys.length_keys,
                    kv_rows=admitted.kv.length_keys,
                    window_rows=admitted.window.length_keys,
                    layer_version=admitted.version,
                    implementation=service.require_worker_info().attention.implementation,
                    max_chunk_bytes=int(limits.max_chunk_bytes),
                )
                await writer.write(pb.SparseAttendResponse(accepted=accepted))
                stream = AttendStream(service, admitted, parameters, key, context, writer)
                admitted.users.append(stream)
                done = await stream.run()
            ended = pb.SparseAttendDone(row_count=done.rows, device_us=done.device_us, queued_ms=done.queued_ms)
            await writer.write(pb.SparseAttendResponse(done=ended))
        except ServiceError as error:
            await writer.refuse(pb.SparseAttendResponse(refused=to_message(error)))
            raise

    async def sparse_attend_batch(
        self, request: pb.SparseAttendBatchRequest, context: Any
    ) -> pb.SparseAttendBatchResponse:
        """SparseAttendBatch."""
        return await BatchAttention(self._service, self._identify(context), request, context.time_remaining).run()
