"""Runs operations on an asyncio gRPC channel.

On the event loop: the caller's task runs the operation and reads its stream; `aio_stream` sends, with tasks of its own.
Fetching from the caller's iterator is another task, which outlives an attempt: a retry goes on with its block.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc
import grpc.aio

from streamindex_client.aio_stream import AioStream
from streamindex_client.contract import REQUEST_ID, Method
from streamindex_client.effects import Call, Close, Emit, Notify, Open, Read, Sleep
from streamindex_client.errors import UnavailableError, from_rpc
from streamindex_client.propagation import trace_headers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from streamindex_client.effects import Duplex, Effect, Operation

__all__ = ["AioDriver", "Run"]

_Result = TypeVar("_Result")
Metadata = tuple[tuple[str, str], ...]


class AioDriver:
    """A channel and the metadata of every call on it."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata, new_id: Callable[[], str]) -> None:
        self._channel = channel
        self._metadata = metadata
        self._new_id = new_id
        self._calls: dict[str, Any] = {}

    async def run(self, operation: Operation[_Result]) -> _Result:
        """The result of an operation that emits nothing."""
        run = Run(self, operation, None)
        async for _ in run.events():
            raise AssertionError("an operation that is run emits nothing")
        return run.result

    def events(self, operation: Operation[Any], blocks: Any = None) -> AsyncGenerator[Any, None]:
        """What the operation emits, as the caller asks for it; `blocks` (sync or async) feeds its stream."""
        return Run(self, operation, blocks).events()

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
        return grpc.aio.Metadata(*self._metadata, *trace_headers(self._metadata), (REQUEST_ID, request_id))


class Run(Generic[_Result]):
    """One operation on its way."""

    result: _Result

    def __init__(self, driver: AioDriver, operation: Operation[_Result], blocks: Any) -> None:
        self._driver = driver
        self._operation = operation
        if blocks is not None:
            blocks = aiter(blocks) if hasattr(blocks, "__aiter__") else iter(blocks)
        self._blocks = blocks
        self._moved = asyncio.Event()
        self._stream: AioStream | None = None
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
                self._stream = AioStream(self, effect.duplex, call, request_id)
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
        """The caller's iterator or tensor has raised, or sending has: end the operation with that.

        A cancellation of the caller's making is told as a RuntimeError: the caller's own task was not cancelled.
        """
        if isinstance(error, asyncio.CancelledError):
            cancelled, error = error, RuntimeError("the iterator was cancelled")
            error.__cause__ = cancelled
        self._source_failure = error

    async def _next_block(self) -> Any:
        if hasattr(self._blocks, "__anext__"):
            return await anext(self._blocks, _END)
        return _END if self._blocks is None else next(self._blocks, _END)


_END: Any = object()
