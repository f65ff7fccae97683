"""grpc.health.v1: whether the service is ready, by name; `""` is all of it.

Whoever gets a connection may ask, so what a watcher sends is not kept, and those who watch are bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from streamindex_service.errors import InvalidArgumentError, ServiceError, TooManyError
from streamindex_service.frontend.rpc import abort

MAX_REQUEST_BYTES = 256


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The states, and those who watch them, at most `max_watchers` at a time.

    In the library's servicer a watcher keeps the lock that every change takes for as long as it writes. Whoever watches
    and does not read would hold up what all others are told, and the end of the service; and anybody may watch. Here a
    change waits for nobody, and a watcher may miss states between two that it is told.
    """

    def __init__(self, max_watchers: int) -> None:
        self._max_watchers = max_watchers
        self._watching = 0
        self._states: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._over = False

    def set(self, names: Iterable[str], *, ready: bool) -> None:
        """Say so for these names. Of no effect after `end`."""
        if self._over:
            return
        status = health_pb2.HealthCheckResponse
        self._states.update(dict.fromkeys(names, status.SERVING if ready else status.NOT_SERVING))
        self._changed.set()  # for those who wait now
        self._changed = asyncio.Event()

    def end(self) -> None:
        """Nothing is ready any more, for good."""
        self.set(list(self._states), ready=False)
        self._over = True

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:  # noqa: N802
        """The state of a name; NOT_FOUND for one that there is not."""
        state = self._states.get(request.service)
        if state is None:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=state)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802
        """The state of a name now, and whenever it has changed; SERVICE_UNKNOWN for one that there is not."""
        refusal = self._refusal(request.ByteSize())
        if refusal is not None:
            await abort(context, refusal)
        self._watching += 1
        try:
            await self._tell(request.service, context)
        finally:
            self._watching -= 1

    async def _tell(self, name: str, context: Any) -> None:
        told = None
        while True:
            changed = self._changed
            state = self._states.get(name, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if state == told:
                await changed.wait()
            else:
                await context.write(health_pb2.HealthCheckResponse(status=state))
                told = state

    def _refusal(self, request_bytes: int) -> ServiceError | None:
        # A call holds its request for as long as it is open: one that is longer than any service's name ends it.
        if request_bytes > MAX_REQUEST_BYTES:
            return InvalidArgumentError(
                f"a request to watch must be at most {MAX_REQUEST_BYTES} bytes", metadata={"max": MAX_REQUEST_BYTES}
            )
        if self._watching >= self._max_watchers:
            return TooManyError(
                f"{self._max_watchers} watch the health already, as many as may", metadata={"limit": self._max_watchers}
            )
        return None
