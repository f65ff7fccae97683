"""What the server is, and how busy."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from streamindex.v1 import server_pb2 as pb
from streamindex.v1 import types_pb2

from streamindex_service import __version__
from streamindex_service.errors import InvalidArgumentError, TooManyError
from streamindex_service.frontend import requests
from streamindex_service.frontend.identity import Identify
from streamindex_service.frontend.load import load_of
from streamindex_service.frontend.messages import MessageWriter
from streamindex_service.frontend.service import Service

_WATCH_INTERVAL_MS = (100, 60_000)
_DEFAULT_INTERVAL_MS = 1000


class ServerServicer:
    """streamindex.v1.ServerService."""

    def __init__(self, service: Service, identify: Identify) -> None:
        self._service = service
        self._identify = identify
        self._watchers = 0

    async def get_capabilities(self, request: pb.GetCapabilitiesRequest, context: Any) -> pb.GetCapabilitiesResponse:
        """GetCapabilities."""
        worker = self._service.require_worker_info()
        limits = self._service.settings.limits
        return pb.GetCapabilitiesResponse(
            service_version=__version__,
            device=worker.device_name,
            implementation=worker.implementation,
            implementations=[
                pb.Implementation(name=i.name, key_formats=i.key_formats, repeatable=i.repeatable)
                for i in worker.implementations
            ],
            key_formats=sorted(int(f) for f in self._service.formats),  # type: ignore[misc]
            limits=pb.Limits(
                max_heads=requests.MAX_HEADS,
                max_head_dim=requests.MAX_HEAD_DIM,
                max_top_k=limits.max_top_k,
                max_layers=limits.max_layers,
                max_layer_keys=limits.max_layer_keys,
                max_chunk_bytes=int(limits.max_chunk_bytes),
                max_batch_items=limits.max_batch_items,
                max_batch_rows=limits.max_batch_rows,
                max_attention_heads=requests.MAX_ATTENTION_HEADS,
                max_window=requests.MAX_WINDOW,
                max_given_indices=limits.max_given_indices,
            ),
            search_modes=[types_pb2.SEARCH_MODE_EXACT],
            attention_implementation=worker.attention.implementation,
            kv_formats=sorted(int(f) for f in self._service.kv_formats),  # type: ignore[misc]
        )

    async def get_load(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:
        """GetLoad."""
        return await load_of(self._service, self._identify(context))

    async def watch_load(self, request: pb.WatchLoadRequest, context: Any) -> None:
        """WatchLoad."""
        least, most = _WATCH_INTERVAL_MS
        interval_ms = request.interval_ms or _DEFAULT_INTERVAL_MS
        if not least <= interval_ms <= most:
            raise InvalidArgumentError(
                f"interval_ms must be from {least} to {most}",
                field="interval_ms",
                metadata={"min": least, "max": most},
            )
        limit = self._service.settings.server.max_watchers
        if self._watchers >= limit:
            raise TooManyError(f"{limit} callers watch already, as many as may", metadata={"limit": limit})
        # One who does not read must not keep its place from others.
        writer = MessageWriter(context, self._service.settings.limits.slow_consumer_s)
        self._watchers += 1
        try:
            while True:
                load = await load_of(self._service, self._identify(context))
                await writer.write(pb.WatchLoadResponse(load=load))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._service.draining.wait(), interval_ms / 1000)
                self._service.admit()
        finally:
            self._watchers -= 1
