"""How calls are registered, and how refusals leave.

Handlers are made from the descriptors of the contract, so a method that is in the proto and has no servicer answers
UNIMPLEMENTED. The chunk streams have their own readers and writers (see `streamindex.framing`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from streamindex import framing, status
from streamindex.v1 import types_pb2

from streamindex_service.errors import ServiceError, UnimplementedError
from streamindex_service.frontend.messages import Malformed

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}

Method = Callable[..., Any]


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
