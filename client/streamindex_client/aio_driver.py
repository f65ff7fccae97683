"""Runs operations on an asyncio gRPC channel.

All on the event loop: the caller's task runs the operation and reads the stream, a task of the stream's own sends.
Fetching from the caller's iterator is a third task, which outlives an attempt: a retry goes on with its block.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc
import grpc.aio

from streamindex_client.contract import REQUEST_ID, Method
from streamindex_client.effects import Call, Close, Emit, Notify, Open, Pause, Read, Sleep
from streamindex_client.errors import UnavailableError, from_rpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from streamindex_client.effects import Duplex, Effect, Operation
    from streamindex_client.errors import StreamIndexError

__all__ = ["AioDriver"]

_Result = TypeVar("_Result")
Metadata = tuple[tuple[str, str], ...]
_STATUS_LOST = "Internal error from Core"
_CALL_IS_OVER = (grpc.RpcError, grpc.aio.InternalError, asyncio.InvalidStateError, grpc.aio.UsageError)


class AioDriver:
    """A channel and the metadata of every call on it."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata, new_id: Callable[[], str]) -> None:
        self._channel = channel
        self._metadata = metadata
        self._new_id = new_id
        self._calls: dict[str, Any] = {}

    async def run(self, operation: Operation[_Result]) -> _Result:
        """The result of an operation that emits nothing."""
        run = _Run(self, operation, None)
        async for _ in run.events():
            raise AssertionError("an operation that is run emits nothing")
        return run.result

    def events(self, operation: Operation[Any], blocks: Any = None) -> AsyncGenerator[Any, None]:
        """What the operation emits, as the caller asks for it; `blocks` (sync or async) feeds its stream."""
        return _Run(self, operation, blocks).events()

    async def close(self) -> None:
        """Close the channel; calls that run fail."""
        await self._channel.close()

    async def call(self, effect: Call) -> Any:
        """Make a unary call."""
        request_id = self._new_id()
        path = effect.method.path
        if path not in self._calls:
            self._calls[path] = self._channel.unary_unary(
                path,
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=effect.method.response.FromString,
            )
        try:
            return await self._calls[path](effect.request, timeout=effect.timeout_s, metadata=self._tag(request_id))
        except grpc.RpcError as error:
            raise from_rpc(error, request_id) from None
        except grpc.aio.UsageError as error:  # gRPC's word for a channel that the caller has closed
            raise UnavailableError(str(error), reason="CLOSED") from None

    def open(self, method: Method, timeout_s: float | None) -> tuple[Any, str]:
        """Start a stream of bytes; its call and its id."""
        request_id = self._new_id()
        if method.path not in self._calls:
            self._calls[method.path] = self._channel.stream_stream(method.path)
        try:
            return self._calls[method.path](timeout=timeout_s, metadata=self._tag(request_id)), request_id
        except grpc.aio.UsageError as error:
            raise UnavailableError(str(error), reason="CLOSED") from None

    def _tag(self, request_id: str) -> grpc.aio.Metadata:
        return grpc.aio.Metadata(*self._metadata, (REQUEST_ID, request_id))


class _Run(Generic[_Result]):
    """One operation on its way."""

    result: _Result

    def __init__(self, driver: AioDriver, operation: Operation[_Result], blocks: Any) -> None:
        self._driver = driver
        self._operation = operation
        if blocks is not None:
            blocks = aiter(blocks) if hasattr(blocks, "__aiter__") else iter(blocks)
        self._blocks = blocks
        self._moved = asyncio.Event()
        self._stream: _Stream | None = None
        self._pulling: asyncio.Task[Any] | None = None
        self._source_failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the caller's iterator or tensor has raised."""
        return self._source_failure is not None

    async def events(self) -> AsyncGenerator[Any, None]:
        """Run the operation, giving what it emits; `result` is set at the end."""
        value: Any = None
        failure: Exception | None = None
        try:
            while True:
                try:
                    effect = self._resume(value, failure)
                except StopIteration as stop:
                    self.result = stop.value
                    return
                finally:
                    self._moved.set()
                value = failure = None
                if isinstance(effect, Emit):
                    yield effect.value
                    continue
                try:
                    value = await self._perform(effect)
                except Exception as error:
                    if error is self._source_failure:
                        raise
                    failure = error
        finally:
            self._operation.close()
            await self._close()
            if self._pulling is not None:
                self._pulling.cancel()

    def _resume(self, result: Any, failure: Exception | None) -> Effect:
        return self._operation.send(result) if failure is None else self._operation.throw(failure)

    async def _perform(self, effect: Effect) -> Any:
        match effect:
            case Read():
                return await self._read()
            case Call():
                return await self._driver.call(effect)
            case Sleep():
                await asyncio.sleep(effect.seconds)
            case Notify():
                effect.callback(effect.done, effect.total)
            case Open():
                await self._close()
                call, request_id = self._driver.open(effect.method, effect.timeout_s)
                self._stream = _Stream(self, effect.duplex, call, request_id)
            case Close():
                await self._close()
        return None

    async def _read(self) -> bytes | None:
        stream = self._stream
        assert stream is not None, "a stream is read while it is open"
        try:
            message = await stream.call.read()
        except grpc.RpcError as error:
            if self._source_failure is not None:
                raise self._source_failure from None
            raise stream.explain(error) from None
        except asyncio.CancelledError:
            if self._source_failure is not None and stream.call.cancelled():
                raise self._source_failure from None
            raise
        return None if message is grpc.aio.EOF else message

    async def _close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()

    async def wait(self) -> None:
        """Until the operation has moved on."""
        self._moved.clear()
        await self._moved.wait()

    async def pull(self, duplex: Duplex) -> None:
        """Fetch one block of the caller's iterator; a cancelled wait for it leaves the fetching to the next."""
        if self._pulling is None:
            self._pulling = asyncio.ensure_future(self._next_block())
        pulling = self._pulling
        await asyncio.wait([pulling])
        self._pulling = None
        block = pulling.result()
        if block is _END:
            duplex.end_input()
        else:
            duplex.feed(block)

    def fail(self, error: BaseException) -> None:
        """The caller's iterator or tensor has raised: end the operation with that."""
        self._source_failure = error

    async def _next_block(self) -> Any:
        if hasattr(self._blocks, "__anext__"):
            return await anext(self._blocks, _END)
        return _END if self._blocks is None else next(self._blocks, _END)


class _Stream:
    """One attempt's stream, and the task that sends."""

    def __init__(self, run: _Run[Any], duplex: Duplex, call: Any, request_id: str) -> None:
        self._run = run
        self._duplex = duplex
        self.call = call
        self.request_id = request_id
        self._write = self._writer()
        self._sender: asyncio.Task[None] = asyncio.ensure_future(self._send())

    def explain(self, error: grpc.RpcError) -> StreamIndexError:
        """The typed error of a stream that broke."""
        if isinstance(error, grpc.aio.AioRpcError) and error.details() == _STATUS_LOST:
            return UnavailableError("the stream broke while sending", reason="BROKEN_STREAM")
        return from_rpc(error, self.request_id)

    async def close(self) -> None:
        """Cancel the call and end the sender."""
        self._sender.cancel()
        self.call.cancel()
        await asyncio.wait([self._sender])

    async def _send(self) -> None:
        try:
            await self.call.wait_for_connection()
            while (message := await self._next_message()) is not None:
                await self._write(message)
            await self.call.done_writing()
        except Exception as error:
            if self._run.failed:
                self.call.cancel()
            elif not isinstance(error, _CALL_IS_OVER):
                raise
            # otherwise the reader learns why

    async def _next_message(self) -> bytes | None:
        """The next message to send, when there is one; None at the end."""
        try:
            while (step := self._duplex.next_step()) is not Pause.HALF_CLOSE:
                if not isinstance(step, Pause):
                    return step()
                if step is Pause.NEED_INPUT:
                    await self._run.pull(self._duplex)
                else:
                    await self._run.wait()
        except Exception as error:
            self._run.fail(error)
            raise
        return None

    def _writer(self) -> Callable[[bytes], Awaitable[None]]:
        """How to send a message.

        `call.write` answers a failed send by ending the call with a status of its own making: the refusal that the
        server sent, in-band and in the trailers, can then no longer be read. What it calls itself does not.
        """
        core = getattr(self.call, "_cython_call", None)
        send: Callable[[bytes], Awaitable[None]] = getattr(core, "send_serialized_message", None) or self.call.write
        return send


_END: Any = object()
