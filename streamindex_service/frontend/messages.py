"""The messages of streams: how they are read and written, one at a time, for as long as the peer keeps up."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, NoReturn

import grpc
from streamindex import framing

from streamindex_service.errors import MalformedMessageError, ServiceError, SlowConsumerError
from streamindex_service.frontend.futures import seen

REFUSAL_TIMEOUT_S = 1.0


class Malformed:
    """What a stream's reader gives in the place of a message that is none; reading it raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error


async def read_message(context: Any) -> Any:
    """The next message of a stream, None at its end. Raises MalformedMessageError."""
    message = await context.read()
    if message is grpc.aio.EOF:
        return None
    if isinstance(message, Malformed):
        raise_malformed(message)
    return message


async def read_first(context: Any, timeout_s: float) -> Any:
    """The message that a stream begins with, None where it ends at once. Raises MalformedMessageError;
    SlowConsumerError when none comes in time."""
    try:
        async with asyncio.timeout(timeout_s):
            return await read_message(context)
    except TimeoutError:
        raise SlowConsumerError("the call was made, and no header came for too long") from None


async def read_header(context: Any, timeout_s: float) -> Any:
    """The header that a stream of rows begins with. Raises MalformedMessageError for anything else; SlowConsumerError
    when none comes in time."""
    message = await read_first(context, timeout_s)
    if message is None or isinstance(message, framing.Chunk) or message.WhichOneof("message") != "header":
        raise MalformedMessageError("the first message must be a header", field="header")
    return message.header


def raise_malformed(message: Malformed) -> NoReturn:
    """Always raises MalformedMessageError."""
    raise MalformedMessageError("the message is not of the expected type") from message.error


class MessageReader:
    """Reads the messages of one stream, in the task that calls `next`; `stop` ends a read that waits.

    A task of its own for every message would cost as much as the message's checksum.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._task: asyncio.Task[Any] | None = None  # that waits for a message
        self._reason: ServiceError | None = None

    @property
    def waits(self) -> bool:
        """Whether somebody waits for a message."""
        return self._task is not None

    async def next(self) -> Any:
        """The next message, None at the end of the stream. Raises MalformedMessageError, and what `stop` was told."""
        self._task = task = asyncio.current_task()
        try:
            return await read_message(self._context)
        except asyncio.CancelledError:
            if self._reason is None or task is None:
                raise
            task.uncancel()
            # It is let go here: raised, it holds the frames that hold this.
            reason, self._reason = self._reason, None
            raise reason from None
        finally:
            self._task = None

    def stop(self, reason: ServiceError) -> None:
        """End the read that waits, if one does, with this error; the stream is of no use after that."""
        if self._task is not None:
            self._reason = reason
            self._task.cancel()


class MessageWriter:
    """Writes the messages of one stream, one at a time.

    gRPC cannot take a write back: under back-pressure it neither ends nor sees a cancellation, and a second write
    beside it is an error. So a write that was begun goes on in a task of its own, whoever stops waiting for it, and the
    next one comes after it.
    """

    def __init__(self, context: Any, timeout_s: float) -> None:
        self._context = context
        self._timeout_s = timeout_s
        self._last: asyncio.Future[None] | None = None

    async def write(self, message: Any) -> None:
        """Hand a message to gRPC. Raises SlowConsumerError when the peer does not take it in time."""
        try:
            await self._write(message, self._timeout_s)
        except TimeoutError:
            raise SlowConsumerError("answers were not read for too long") from None

    async def refuse(self, message: Any) -> None:
        """Say in the stream why it ends, before the status does: an abort in the middle may lose its details.

        A caller who does not read would not read this either; the call is not held up for it.
        """
        with contextlib.suppress(TimeoutError):
            await self._write(message, REFUSAL_TIMEOUT_S)

    async def _write(self, message: Any, timeout_s: float) -> None:
        if self._last is not None and not self._last.done():
            await asyncio.wait([self._last], timeout=timeout_s)
            if not self._last.done():
                raise TimeoutError
        self._last = asyncio.ensure_future(self._context.write(message))
        self._last.add_done_callback(seen)
        await asyncio.wait([self._last], timeout=timeout_s)
        if not self._last.done():
            raise TimeoutError
        self._last.result()
