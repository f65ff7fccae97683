"""The rich error model: `Error` messages to and from the `grpc-status-details-bin` trailer.

One refusal has two forms, the in-band `streamindex.v1.Error` and the google.rpc.Status in the trailers of the call
(see proto/streamindex/v1/status.proto); these functions convert between them.
"""

from __future__ import annotations

from google.protobuf import any_pb2, duration_pb2, message

from streamindex.v1 import status_pb2, types_pb2

__all__ = ["DOMAIN", "TRAILER", "from_trailer", "to_trailer"]

TRAILER = "grpc-status-details-bin"
DOMAIN = "streamindex"
_PREFIX = "type.googleapis.com/google.rpc."


def to_trailer(error: types_pb2.Error) -> bytes:
    """Serialise an error as google.rpc.Status with ErrorInfo, and BadRequest and RetryInfo where they apply."""
    status = status_pb2.RichStatus(code=error.code, message=error.message)

    def attach(name: str, detail: message.Message) -> None:
        status.details.append(any_pb2.Any(type_url=_PREFIX + name, value=detail.SerializeToString()))

    attach("ErrorInfo", status_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    if error.field:
        violation = status_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        attach("BadRequest", status_pb2.BadRequest(field_violations=[violation]))
    if error.HasField("retry_after_ms"):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        attach("RetryInfo", status_pb2.RetryInfo(retry_delay=delay))
    data: bytes = status.SerializeToString()
    return data


def from_trailer(data: bytes) -> types_pb2.Error | None:
    """The error in a trailer; None if it is not one of this service's."""
    try:
        status = status_pb2.RichStatus.FromString(data)
        error = types_pb2.Error(code=status.code, message=status.message)
        for detail in status.details:
            name = detail.type_url.removeprefix(_PREFIX)
            if name == "ErrorInfo":
                info = status_pb2.ErrorInfo.FromString(detail.value)
                if info.domain != DOMAIN:
                    return None
                error.reason = info.reason
                error.metadata.update(info.metadata)
            elif name == "BadRequest":
                violations = status_pb2.BadRequest.FromString(detail.value).field_violations
                error.field = violations[0].field if violations else ""
            elif name == "RetryInfo":
                delay = status_pb2.RetryInfo.FromString(detail.value).retry_delay
                error.retry_after_ms = max(0, delay.ToMilliseconds())
    except (message.DecodeError, ValueError):
        return None
    return error if error.reason else None
