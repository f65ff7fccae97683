"""What surrounds every call."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import structlog

from streamindex_service.errors import InternalError, ServiceError
from streamindex_service.frontend.call import CURRENT, Call
from streamindex_service.frontend.call_context import CallContext
from streamindex_service.frontend.collector import let_go_of_frames
from streamindex_service.frontend.futures import seen
from streamindex_service.frontend.identity import Identify
from streamindex_service.frontend.messages import REFUSAL_TIMEOUT_S, Malformed, MessageWriter, raise_malformed
from streamindex_service.frontend.rpc import Method, abort, to_message
from streamindex_service.telemetry import trace
from streamindex_service.telemetry.counters import Counters
from streamindex_service.telemetry.spans import Tracing

REQUEST_ID = "x-request-id"
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._:-]{1,64}")


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
            running = CallContext(context)
            del context
            # A stream's servicer asks by itself, so that it can say in-band what it refuses with.
            admit = None if handler.request_streaming else self._admit
            if handler.request_streaming:
                request = None  # gRPC's iterator, which refers to the context; servicers read by themselves
            try:
                return await self._call(behaviour, streams, admit, record, details.method, request, running)
            finally:
                running.end()

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

    async def _identified(self, path: str, context: CallContext) -> str:
        """The caller. A refusal is said in-band first where the method has a message for it."""
        try:
            return self._authenticate(context)
        except ServiceError as error:
            if path in self._in_band:  # nobody knows who this is: it must not be able to hold the call by not reading
                await MessageWriter(context, REFUSAL_TIMEOUT_S).refuse(self._in_band[path](refused=to_message(error)))
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
        context: CallContext,
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
        metadata.add_done_callback(seen)
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
            let_go_of_frames(error)
            await abort(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError) as error:
            code = "CANCELLED"
            let_go_of_frames(error)
            raise
        except Exception as error:
            # Not a refusal but a defect of ours; the caller learns that and no more.
            code = reason = InternalError.reason
            self._counters.refusals[InternalError.reason] += 1
            self._log.error("call_failed", exc_info=True)
            let_go_of_frames(error)
            await abort(context, InternalError())
        finally:
            record.counters.running -= 1
            record.counters.ended(code, time.monotonic() - started)
            if record.span is not None:
                record.span.ended(code, reason)
            self.running.discard(task)
