"""Errors of the client: one tree, attributes instead of strings.

StreamIndexError                    .code .reason .field .metadata .retry_after_s .request_id .retriable
├── InvalidRequestError             INVALID_ARGUMENT; also a ValueError
│   ├── InputError                  found here, before anything was sent
│   ├── NonFiniteError              NON_FINITE: metadata names tensor and row
│   └── ExceedsBudgetError          EXCEEDS_BUDGET: can never fit
├── NotFoundError                   unknown, expired, deleted, or another caller's
├── FailedPreconditionError
│   ├── ConventionMismatchError     CONVENTION_MISMATCH: tag or key format differs from the cache's
│   └── PoisonError                 POISON: this request has killed two workers
├── UploadConflictError             UPLOAD_CONFLICT: the same rows came with other bytes
├── OffsetGapError                  OFFSET_GAP: .expected_row_offset
├── DataLossError                   a checksum or digest that differs, on either side; SPILL_UNREADABLE: keys are lost
├── ResourceExhaustedError          queue, memory or a count is at its limit
├── UnavailableError                no connection, or the service is draining
│   └── WorkerLostError             WORKER_LOST: the device process died
├── DeadlineError                   the time given is over
│   └── SlowConsumerError           SLOW_CONSUMER: answers were not read
├── AuthenticationError             UNAUTHENTICATED
├── PermissionDeniedError           PERMISSION_DENIED
├── CancelledCallError              the call was cancelled by one of its ends
├── UnimplementedError              a call of a later version
└── InternalError                   a defect of the service
    └── ProtocolError               the server's messages break the contract
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import grpc
from streamindex import status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from streamindex.v1 import types_pb2

__all__ = [
    "AuthenticationError",
    "CancelledCallError",
    "ConventionMismatchError",
    "DataLossError",
    "DeadlineError",
    "ExceedsBudgetError",
    "FailedPreconditionError",
    "InputError",
    "InternalError",
    "InvalidRequestError",
    "NonFiniteError",
    "NotFoundError",
    "OffsetGapError",
    "PermissionDeniedError",
    "PoisonError",
    "ProtocolError",
    "ResourceExhaustedError",
    "SlowConsumerError",
    "StreamIndexError",
    "UnavailableError",
    "UnimplementedError",
    "UploadConflictError",
    "WorkerLostError",
    "from_message",
    "from_rpc",
    "from_status",
]


class StreamIndexError(Exception):
    """A call that failed.

    `code` is the gRPC status, `reason` the service's stable name of the cause ("" for a bare gRPC status), `field`
    the request field or argument to blame, `metadata` figures, `retry_after_s` the server's delay (None when the
    server did not offer a retry), `request_id` what the server's log calls the call.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        field: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.default_code if code is None else code
        self.reason = reason
        self.field = field
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.request_id = ""

    def __str__(self) -> str:
        """`CODE/REASON: message (figures)`."""
        cause = self.code.name + (f"/{self.reason}" if self.reason else "")
        figures = ", ".join(f"{name}={value}" for name, value in sorted(self.metadata.items()))
        return f"{cause}: {self.message}" + (f" ({figures})" if figures else "")

    @property
    def retriable(self) -> bool:
        """Whether an idempotent call may be sent again unchanged."""
        if self.code in _NEVER_RETRIED:
            return False
        return self.retry_after_s is not None or self.code is grpc.StatusCode.UNAVAILABLE


class InvalidRequestError(StreamIndexError, ValueError):
    """The request can never succeed as it is: a shape, a type, a number out of its limits."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT


class InputError(InvalidRequestError):
    """An argument that is wrong, found before anything was sent; `field` names it."""

    def __init__(self, field: str, expectation: str) -> None:
        super().__init__(f"{field}: {expectation}", reason="INPUT", field=field)


class NonFiniteError(InvalidRequestError):
    """A tensor holds NaN or Inf."""


class ExceedsBudgetError(InvalidRequestError):
    """The request can never fit the service's memory budget."""


class NotFoundError(StreamIndexError):
    """No such cache or upload for this caller."""

    default_code = grpc.StatusCode.NOT_FOUND


class FailedPreconditionError(StreamIndexError):
    """The request does not suit the state of what it names."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION


class ConventionMismatchError(FailedPreconditionError):
    """The convention tag or the format differs from the cache's."""


class PoisonError(FailedPreconditionError):
    """The same request has killed two workers; it is not tried again."""


class UploadConflictError(StreamIndexError):
    """Rows that the server holds were sent again with other bytes."""

    default_code = grpc.StatusCode.ABORTED


class OffsetGapError(StreamIndexError):
    """Rows were left out; the server expects `expected_row_offset` next (None when it does not say)."""

    default_code = grpc.StatusCode.OUT_OF_RANGE

    @property
    def expected_row_offset(self) -> int | None:
        """Row of the upload that the server expects next."""
        text = self.metadata.get("expected_row_offset", "")
        return int(text) if text.isascii() and text.isdigit() else None


class DataLossError(StreamIndexError):
    """Bytes arrived damaged, or the server's disk has not kept them: a checksum or a digest differs."""

    default_code = grpc.StatusCode.DATA_LOSS


class ResourceExhaustedError(StreamIndexError):
    """A queue, a memory budget or a count is at its limit now."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(StreamIndexError):
    """The service cannot be reached, or does not take calls now."""

    default_code = grpc.StatusCode.UNAVAILABLE


class WorkerLostError(UnavailableError):
    """The device process died; a new one is being started, and no key is lost."""


class DeadlineError(StreamIndexError):
    """The operation did not end in the time given for it, retries included."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class SlowConsumerError(DeadlineError):
    """The answers of a search were not read for too long."""


class AuthenticationError(StreamIndexError):
    """No credentials, or unknown ones."""

    default_code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(StreamIndexError):
    """The credentials do not allow this."""

    default_code = grpc.StatusCode.PERMISSION_DENIED


class CancelledCallError(StreamIndexError):
    """The call was cancelled."""

    default_code = grpc.StatusCode.CANCELLED


class UnimplementedError(StreamIndexError):
    """The server does not have this call, or not yet."""

    default_code = grpc.StatusCode.UNIMPLEMENTED


class InternalError(StreamIndexError):
    """A defect of the service."""

    default_code = grpc.StatusCode.INTERNAL


class ProtocolError(InternalError):
    """The server sent what the contract does not allow."""


_NEVER_RETRIED = frozenset(
    {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
)
_BY_REASON: dict[str, type[StreamIndexError]] = {
    "NON_FINITE": NonFiniteError,
    "EXCEEDS_BUDGET": ExceedsBudgetError,
    "CONVENTION_MISMATCH": ConventionMismatchError,
    "POISON": PoisonError,
    "WORKER_LOST": WorkerLostError,
    "SLOW_CONSUMER": SlowConsumerError,
}
_BY_CODE: dict[grpc.StatusCode, type[StreamIndexError]] = {
    kind.default_code: kind
    for kind in (
        InvalidRequestError,
        NotFoundError,
        FailedPreconditionError,
        UploadConflictError,
        OffsetGapError,
        DataLossError,
        ResourceExhaustedError,
        UnavailableError,
        DeadlineError,
        AuthenticationError,
        PermissionDeniedError,
        CancelledCallError,
        UnimplementedError,
        InternalError,
    )
}
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def from_message(error: types_pb2.Error) -> StreamIndexError:
    """The typed error of an in-band `Error`."""
    code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    kind = _BY_CODE.get(code, StreamIndexError)
    special = _BY_REASON.get(error.reason)
    if special is not None and special.default_code is code:
        kind = special
    return kind(
        error.message,
        code=code,
        reason=error.reason,
        field=error.field,
        metadata=dict(error.metadata),
        retry_after_s=error.retry_after_ms / 1000 if error.HasField("retry_after_ms") else None,
    )


def from_status(
    code: grpc.StatusCode, details: str, trailers: Iterable[tuple[str, str | bytes]] = ()
) -> StreamIndexError:
    """The typed error of a call's status: from the service's trailer if there is one, else from the code alone."""
    for key, value in trailers:
        if key == status.TRAILER and isinstance(value, bytes):
            error = status.from_trailer(value)
            if error is not None:
                return from_message(error)
    return _BY_CODE.get(code, StreamIndexError)(details or "no details", code=code)


def from_rpc(error: grpc.RpcError, request_id: str = "") -> StreamIndexError:
    """The typed error of what a sync or asyncio gRPC call raised."""
    trailers = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    code = error.code() if hasattr(error, "code") else None
    details = error.details() if hasattr(error, "details") else None
    typed = from_status(code or grpc.StatusCode.UNKNOWN, details or "", [(str(k), v) for k, v in trailers or ()])
    typed.request_id = request_id
    return typed
