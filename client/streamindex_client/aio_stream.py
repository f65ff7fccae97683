"""One attempt's stream on an asyncio channel.

Two tasks of the stream's own. The builder takes the sender's steps in order and has messages built (the copy and the
checksum), at most `MESSAGES_AHEAD` before the sender takes them. Long messages are built on a thread, beside the event
loop that sends the one before. Whether a message will be long is told by the one before it: a stream of short ones is
over sooner than a thread would start.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from streamindex_client.effects import Pause
from streamindex_client.errors import UnavailableError, from_rpc
from streamindex_client.options import MESSAGES_AHEAD

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from streamindex_client.aio_driver import Run
    from streamindex_client.effects import Duplex
    from streamindex_client.errors import StreamIndexError

__all__ = ["AioStream"]

_LONG_MESSAGE_BYTES = 65_536
_STATUS_LOST = "Internal error from Core"
_CALL_IS_OVER = (grpc.RpcError, grpc.aio.InternalError, asyncio.InvalidStateError, grpc.aio.UsageError)


class AioStream:
    """A stream and its sender, at work from the start. `close` must follow, whatever happens."""

    def __init__(self, run: Run[Any], duplex: Duplex, call: Any, request_id: str) -> None:
        self.call = call
        self._request_id = request_id
        self._run = run
        self._duplex = duplex
        self._room = asyncio.Semaphore(MESSAGES_AHEAD)
        self._ready: asyncio.Queue[bytes | None] = asyncio.Queue()  # None is the end
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="streamindex-build")
        self._building: Future[bytes] | None = None
        self._long = False  # the message before was
        self._write = self._writer()
        self._tasks = [asyncio.ensure_future(self._build()), asyncio.ensure_future(self._send())]

    def explain(self, error: grpc.RpcError) -> StreamIndexError:
        """The typed error of a stream that broke."""
        if isinstance(error, grpc.aio.AioRpcError) and error.details() == _STATUS_LOST:
            return UnavailableError("the stream broke while sending", reason="BROKEN_STREAM")
        return from_rpc(error, self._request_id)

    async def close(self) -> None:
        """Cancel the call and end the sender.

        A message that is being built is waited for, since it reads the caller's tensor.
        """
        for task in self._tasks:
            task.cancel()
        self.call.cancel()
        try:
            await asyncio.wait(self._tasks)
            if self._building is not None:
                await asyncio.gather(asyncio.wrap_future(self._building), return_exceptions=True)
        finally:
            self._threads.shutdown(wait=False)

    async def _build(self) -> None:
        try:
            message: bytes | None = b""
            while message is not None:
                await self._room.acquire()
                message = await self._next_message()
                self._ready.put_nowait(message)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._fail(error)  # not this task was cancelled: what it asked of the caller raised that
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._run.fail(error)
        self.call.cancel()

    async def _next_message(self) -> bytes | None:
        """The next message, when there is one; None at the end."""
        while (step := self._duplex.next_step()) is not Pause.HALF_CLOSE:
            if not isinstance(step, Pause):
                message = await self._on_thread(step) if self._long else step()
                self._long = len(message) >= _LONG_MESSAGE_BYTES
                return message
            if step is Pause.NEED_INPUT:
                await self._run.pull(self._duplex)
            else:
                await self._run.wait()
        return None

    async def _on_thread(self, step: Callable[[], bytes]) -> bytes:
        self._building = self._threads.submit(step)
        return await asyncio.wrap_future(self._building)

    async def _send(self) -> None:
        try:
            await self.call.wait_for_connection()
            while (message := await self._ready.get()) is not None:
                self._room.release()
                await self._write(message)
            await self.call.done_writing()
        except Exception as error:
            if not self._run.failed and not self.call.done() and not isinstance(error, _CALL_IS_OVER):
                self._fail(error)
            # otherwise the reader learns why

    def _writer(self) -> Callable[[bytes], Awaitable[None]]:
        """How to send a message.

        `call.write` answers a failed send by ending the call with a status of its own making: the refusal that the
        server sent, in-band and in the trailers, can then no longer be read. What it calls itself does not.
        """
        core = getattr(self.call, "_cython_call", None)
        send: Callable[[bytes], Awaitable[None]] = getattr(core, "send_serialized_message", None) or self.call.write
        return send
