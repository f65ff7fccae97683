"""grpc.health.v1. Whoever gets a connection may ask, so what it sends is not kept, and those who watch are bounded."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health, health_pb2

from streamindex_service.errors import InvalidArgumentError, ServiceError, TooManyError
from streamindex_service.frontend.rpc import abort

MAX_REQUEST_BYTES = 256


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]
    """The library's, for at most `max_watchers` that watch at a time.

    A call that watches holds its request for as long as it is open, so one that is longer than any service's name ends
    it.
    """

    def __init__(self, max_watchers: int) -> None:
        super().__init__()
        self._max_watchers = max_watchers
        self._watching = 0

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802 (the contract's)
        """Tell the state of a service, and every change of it."""
        refusal = self._refusal(request.ByteSize())
        if refusal is not None:
            await abort(context, refusal)
        self._watching += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watching -= 1

    def _refusal(self, request_bytes: int) -> ServiceError | None:
        if request_bytes > MAX_REQUEST_BYTES:
            return InvalidArgumentError(
                f"a request to watch must be at most {MAX_REQUEST_BYTES} bytes", metadata={"max": MAX_REQUEST_BYTES}
            )
        if self._watching >= self._max_watchers:
            return TooManyError(
                f"{self._max_watchers} watch the health already, as many as may", metadata={"limit": self._max_watchers}
            )
        return None
