"""How calls are registered, what surrounds them, and how refusals leave.

Handlers are made from the descriptors of the contract, so a method that is in the proto and has no servicer answers
UNIMPLEMENTED. The chunk streams have their own readers and writers (see `streamindex.framing`).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.message import DecodeError
from streamindex import framing, status
from streamindex.v1 import types_pb2

from streamindex_service.errors import (
    InternalError,
    MalformedMessageError,
    ServiceError,
    SlowConsumerError,
    UnimplementedError,
)
from streamindex_service.frontend.call import CURRENT, Call
from streamindex_service.frontend.identity import Identify
from streamindex_service.telemetry import trace
from streamindex_service.telemetry.counters import Counters
from streamindex_service.telemetry.spans import Tracing

REQUEST_ID = "x-request-id"
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}

_REFUSAL_TIMEOUT_S = 1.0

Method = Callable[..., Any]


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
            await self._write(message, _REFUSAL_TIMEOUT_S)

    async def _write(self, message: Any, timeout_s: float) -> None:
        if self._last is not None and not self._last.done():
            await asyncio.wait([self._last], timeout=timeout_s)
            if not self._last.done():
                raise TimeoutError
        self._last = asyncio.ensure_future(self._context.write(message))
        self._last.add_done_callback(_seen)
        await asyncio.wait([self._last], timeout=timeout_s)
        if not self._last.done():
            raise TimeoutError
        self._last.result()


def _seen(future: asyncio.Future[Any]) -> None:
    """Nobody may be left to look at the outcome."""
    if not future.cancelled():
        future.exception()


def lenient(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A reader that never raises: an exception inside gRPC's machinery would reach the caller as INTERNAL."""

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except (framing.FramingError, DecodeError) as error:
            return Malformed(error)

    return read


def to_message(error: ServiceError) -> types_pb2.Error:
    """The in-band form of a refusal."""
    return types_pb2.Error(
        code=int(error.code),
        reason=error.reason,
        message=error.message,
        field=error.field,
        metadata=error.metadata,
        retry_after_ms=error.retry_after_ms,
    )


async def abort(context: Any, error: ServiceError) -> None:
    """End the call with a refusal's status and details. Always raises."""
    trailer = (status.TRAILER, status.to_trailer(to_message(error)))
    await context.abort(_STATUS_CODES[int(error.code)], error.message, (trailer,))


def generic_handler(
    service: Any, methods: dict[str, Method], readers: dict[str, Callable[[bytes], Any]]
) -> grpc.GenericRpcHandler:
    """Handlers of a service of the contract. `service` is its descriptor; `readers` replace protobuf's for a method."""
    handlers = {}
    for descriptor in service.methods:
        method = methods.pop(descriptor.name, None) or _unimplemented(descriptor.server_streaming)
        reader = lenient(readers.get(descriptor.name) or descriptor.input_type._concrete_class.FromString)
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[descriptor.client_streaming, descriptor.server_streaming]
        handlers[descriptor.name] = make(method, request_deserializer=reader, response_serializer=_serialize)
    assert not methods, f"{service.full_name} has no {list(methods)}"
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _serialize(message: Any) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def _unimplemented(streaming: bool) -> Method:
    async def unary(request: Any, context: Any) -> None:
        raise UnimplementedError("this call is reserved for a later version")

    async def stream(request: Any, context: Any) -> AsyncIterator[None]:
        raise UnimplementedError("this call is reserved for a later version")
        yield  # makes it a generator

    return stream if streaming else unary


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Around every call of the contract: who calls, request and trace ids, log line, counters, drain, errors.

    `authenticate` gives the caller's identity, or raises; no servicer is reached before it. `admit` raises what a call
    is refused with before it starts (while the server drains, say). `services` are the contract's descriptors.
    `tracing` makes spans, None none.
    """

    def __init__(
        self,
        log: Any,
        authenticate: Identify,
        admit: Callable[[], None],
        counters: Counters,
        services: Sequence[Any],
        tracing: Tracing | None = None,
    ) -> None:
        self._log = log
        self._authenticate = authenticate
        self._in_band = {
            f"/{service.full_name}/{method.name}": method.output_type._concrete_class
            for service in services
            for method in service.methods
            if method.client_streaming and "refused" in method.output_type.fields_by_name
        }
        self._admit = admit
        self._counters = counters
        self._tracing = tracing
        self.running: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Wrap the handler of a call. Whoever reaches the server may ask for its health; reflection is for callers."""
        handler = await continuation(details)
        if handler is None or details.method.startswith("/grpc.health."):
            return handler
        if not details.method.startswith("/streamindex."):
            return self._guarded(handler)
        record = self._record(details)
        streams = handler.request_streaming or handler.response_streaming
        if streams:
            behaviour = handler.stream_stream or handler.unary_stream
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
        else:
            behaviour = handler.unary_unary
            make = grpc.unary_unary_rpc_method_handler

        async def call(request: Any, context: Any) -> Any:
            # A stream's servicer asks by itself, so that it can say in-band what it refuses with.
            admit = None if handler.request_streaming else self._admit
            return await self._call(behaviour, streams, admit, record, details.method, request, context)

        return make(
            call, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )

    def _guarded(self, handler: Any) -> Any:
        async def stream(requests: Any, context: Any) -> AsyncIterator[Any]:
            try:
                self._authenticate(context)
            except ServiceError as error:
                await abort(context, error)
            async for answer in handler.stream_stream(requests, context):
                yield answer

        assert handler.stream_stream is not None, "reflection is one bidirectional stream"
        return grpc.stream_stream_rpc_method_handler(
            stream, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )

    async def _identified(self, path: str, context: Any) -> str:
        """The caller. A refusal is said in-band first where the method has a message for it."""
        try:
            return self._authenticate(context)
        except ServiceError as error:
            if path in self._in_band:  # nobody knows who this is: it must not be able to hold the call by not reading
                await MessageWriter(context, _REFUSAL_TIMEOUT_S).refuse(self._in_band[path](refused=to_message(error)))
            raise

    def _record(self, details: grpc.HandlerCallDetails) -> Call:
        request_id, headers = "", {}
        for key, value in details.invocation_metadata or ():
            if key == REQUEST_ID and isinstance(value, str) and _REQUEST_ID_FORM.fullmatch(value):
                request_id = value
            elif key in trace.HEADERS and isinstance(value, str):
                headers[key] = value
        method, request_id = details.method.rpartition("/")[2], request_id or uuid.uuid4().hex
        counters = self._counters.of(method)
        if self._tracing is None:
            return Call(method, request_id, trace.of_call(headers.get(trace.TRACEPARENT)), counters)
        context, span = self._tracing.start(details.method, request_id, headers)
        return Call(method, request_id, context, counters, span=span)

    async def _call(
        self,
        behaviour: Method,
        streams: bool,
        admit: Callable[[], None] | None,
        record: Call,
        path: str,
        request: Any,
        context: Any,
    ) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self.running.add(task)
        CURRENT.set(record)
        structlog.contextvars.bind_contextvars(
            request_id=record.request_id, trace_id=record.trace.trace_id, method=record.method
        )
        record.counters.running += 1
        started, code, reason = time.monotonic(), "OK", ""
        # On its way through gRPC's own thread and back, a unary call goes on.
        metadata = asyncio.ensure_future(context.send_initial_metadata(((REQUEST_ID, record.request_id),)))
        metadata.add_done_callback(_seen)
        try:
            try:
                if streams:
                    await metadata
                record.caller = await self._identified(path, context)
                if admit is not None:
                    admit()
                if isinstance(request, Malformed):
                    raise_malformed(request)
                result = behaviour(request, context)
                if hasattr(result, "__aiter__"):
                    async for message in result:
                        await context.write(message)
                    return None
                return await result
            finally:
                if not metadata.done():  # neither an answer nor a refusal may overtake it
                    await asyncio.wait([metadata])
        except ServiceError as error:
            code, reason = error.code.name, error.reason
            self._counters.refusals[error.reason] += 1
            log = self._log.error if isinstance(error, InternalError) else self._log.info
            log("refused", reason=error.reason, field=error.field, detail=error.detail, **error.metadata)
            await abort(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            code = "CANCELLED"
            raise
        except Exception:
            # Not a refusal but a defect of ours; the caller learns that and no more.
            code = reason = InternalError.reason
            self._counters.refusals[InternalError.reason] += 1
            self._log.error("call_failed", exc_info=True)
            await abort(context, InternalError())
        finally:
            record.counters.running -= 1
            record.counters.ended(code, time.monotonic() - started)
            if record.span is not None:
                record.span.ended(code, reason)
            self.running.discard(task)
