"""gRPC's context of a call, for as long as the call runs."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import grpc


class CallContext:
    """What servicers use of a `grpc.aio.ServicerContext`. After `end`, every method raises grpc.aio.UsageError.

    gRPC counts a stream as open until nothing refers to its context, and refuses further ones on a connection that has
    too many. An exception that is kept somewhere holds the frames that it came through, and they what they are part of:
    whatever of a call waits for the garbage collector refers to this, and no longer to gRPC's context.
    """

    __slots__ = ("_context",)

    def __init__(self, context: Any) -> None:
        self._context = context

    def end(self) -> None:
        """The call is over."""
        self._context = None

    def read(self) -> Awaitable[Any]:
        """The next message of a stream, grpc.aio.EOF at its end."""
        message: Awaitable[Any] = self._running.read()
        return message

    def write(self, message: Any) -> Awaitable[None]:
        """Hand a message to gRPC."""
        written: Awaitable[None] = self._running.write(message)
        return written

    def abort(
        self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str | bytes], ...]
    ) -> Awaitable[None]:
        """End the call with a status. Raises when awaited, always."""
        aborted: Awaitable[None] = self._running.abort(code, details, metadata)
        return aborted

    def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> Awaitable[None]:
        """Headers of the answer."""
        sent: Awaitable[None] = self._running.send_initial_metadata(metadata)
        return sent

    def invocation_metadata(self) -> Any:
        """Headers of the call: pairs of name and value, or None."""
        return self._running.invocation_metadata()

    def auth_context(self) -> Any:
        """What the handshake found out about the peer, by name."""
        return self._running.auth_context()

    def peer(self) -> str:
        """The peer's address, as gRPC writes it."""
        address: str = self._running.peer()
        return address

    def time_remaining(self) -> float | None:
        """Seconds to the caller's deadline; None without one."""
        left: float | None = self._running.time_remaining()
        return left

    @property
    def _running(self) -> Any:
        if self._context is None:
            raise grpc.aio.UsageError("the call has ended")
        return self._context
