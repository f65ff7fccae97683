"""Every way in which a request can end badly: one closed tree.

    ServiceError
    ├── InvalidArgumentError          INVALID_ARGUMENT     INVALID_ARGUMENT
    │   ├── MalformedMessageError                          MALFORMED_MESSAGE
    │   ├── NonFiniteError                                 NON_FINITE
    │   └── ExceedsBudgetError                             EXCEEDS_BUDGET
    ├── UnauthenticatedError          UNAUTHENTICATED      UNAUTHENTICATED
    ├── PermissionDeniedError         PERMISSION_DENIED    PERMISSION_DENIED
    ├── CacheNotFoundError            NOT_FOUND            CACHE_NOT_FOUND
    ├── UploadNotFoundError           NOT_FOUND            UPLOAD_NOT_FOUND
    ├── ConventionMismatchError       FAILED_PRECONDITION  CONVENTION_MISMATCH
    ├── PoisonError                   FAILED_PRECONDITION  POISON
    ├── UploadBusyError               FAILED_PRECONDITION  UPLOAD_BUSY           may be retried
    ├── LayerChangedError             FAILED_PRECONDITION  LAYER_CHANGED
    ├── NoKvRowsError                 FAILED_PRECONDITION  NO_KV_ROWS
    ├── UploadConflictError           ABORTED              UPLOAD_CONFLICT
    ├── OffsetGapError                OUT_OF_RANGE         OFFSET_GAP
    ├── ChecksumError                 DATA_LOSS            CHECKSUM
    ├── DigestError                   DATA_LOSS            DIGEST
    ├── SpillUnreadableError          DATA_LOSS            SPILL_UNREADABLE
    ├── QueueFullError                RESOURCE_EXHAUSTED   QUEUE_FULL            may be retried
    ├── DeadlineUnreachableError      RESOURCE_EXHAUSTED   DEADLINE_UNREACHABLE  may be retried
    ├── HostMemoryError               RESOURCE_EXHAUSTED   HOST_MEMORY           may be retried
    │   └── HostQuotaError                                 HOST_MEMORY
    ├── DeviceMemoryError             RESOURCE_EXHAUSTED   DEVICE_MEMORY         may be retried
    ├── TooManyError                  RESOURCE_EXHAUSTED   TOO_MANY              may be retried
    ├── SlowConsumerError             DEADLINE_EXCEEDED    SLOW_CONSUMER
    ├── WorkerLostError               UNAVAILABLE          WORKER_LOST           may be retried
    ├── NotReadyError                 UNAVAILABLE          NOT_READY             may be retried
    ├── DrainingError                 UNAVAILABLE          DRAINING              may be retried
    ├── UnimplementedError            UNIMPLEMENTED        UNIMPLEMENTED
    └── InternalError                 INTERNAL             INTERNAL

`str(error)` is what the caller reads; it never holds internal text, paths or names of memory. What only the log may
know goes into `detail`. The standard library is all that this module needs, so the core may use it.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Code(enum.IntEnum):
    """The gRPC status codes that this service uses."""

    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class ServiceError(Exception):
    """A request cannot be served.

    Attributes: `code` and `reason` (of the class), `message` and `metadata` (for the caller), `field` (the request
    field to blame, "" for none), `retry_after_ms` (None exactly when the request must not be retried unchanged),
    `detail` (for the log alone).
    """

    code: ClassVar[Code]
    reason: ClassVar[str]
    default_retry_after_ms: ClassVar[int | None] = None

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        metadata: dict[str, int | str] | None = None,
        retry_after_ms: int | None = None,
        detail: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        # A class that may not be retried never says so, whatever it is given.
        may_retry = self.default_retry_after_ms is not None
        self.retry_after_ms = (retry_after_ms or self.default_retry_after_ms) if may_retry else None
        self.detail = detail


class InvalidArgumentError(ServiceError):
    """A field is out of its limits or disagrees with another."""

    code, reason = Code.INVALID_ARGUMENT, "INVALID_ARGUMENT"


class MalformedMessageError(InvalidArgumentError):
    """The bytes are no message, or the messages come in an order that means nothing."""

    reason = "MALFORMED_MESSAGE"


class NonFiniteError(InvalidArgumentError):
    """A tensor holds NaN or Inf."""

    reason = "NON_FINITE"


class ExceedsBudgetError(InvalidArgumentError):
    """The request can never fit the budget."""

    reason = "EXCEEDS_BUDGET"


class UnauthenticatedError(ServiceError):
    """The caller does not say who it is."""

    code, reason = Code.UNAUTHENTICATED, "UNAUTHENTICATED"

    def __init__(self) -> None:
        super().__init__("this service asks for a bearer token or a client certificate")


class PermissionDeniedError(ServiceError):
    """What the caller says it is, it is not: one text, whatever is wrong with the credentials."""

    code, reason = Code.PERMISSION_DENIED, "PERMISSION_DENIED"

    def __init__(self) -> None:
        super().__init__("these credentials are not good here")


class CacheNotFoundError(ServiceError):
    """Unknown, expired, deleted, or another caller's: one text for all, so that ids cannot be probed."""

    code, reason = Code.NOT_FOUND, "CACHE_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__("no such key cache", field="key_cache_id")


class UploadNotFoundError(ServiceError):
    """Unknown, expired, or another caller's."""

    code, reason = Code.NOT_FOUND, "UPLOAD_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__("no such upload", field="upload_id")


class ConventionMismatchError(ServiceError):
    """The keys were made in another way than the queries."""

    code, reason = Code.FAILED_PRECONDITION, "CONVENTION_MISMATCH"


class PoisonError(ServiceError):
    """This request has killed workers."""

    code, reason = Code.FAILED_PRECONDITION, "POISON"


class UploadBusyError(ServiceError):
    """Another stream is writing this upload."""

    code, reason, default_retry_after_ms = Code.FAILED_PRECONDITION, "UPLOAD_BUSY", 200


class LayerChangedError(ServiceError):
    """The layer is not as expected any more: an upload's rows would leave a gap, or a search would mix two states."""

    code, reason = Code.FAILED_PRECONDITION, "LAYER_CHANGED"


class NoKvRowsError(ServiceError):
    """The cache, or the layer, does not hold the rows that attention needs."""

    code, reason = Code.FAILED_PRECONDITION, "NO_KV_ROWS"


class UploadConflictError(ServiceError):
    """A chunk repeats acknowledged rows with other bytes."""

    code, reason = Code.ABORTED, "UPLOAD_CONFLICT"


class OffsetGapError(ServiceError):
    """A chunk does not go on where the rows held end."""

    code, reason = Code.OUT_OF_RANGE, "OFFSET_GAP"


class ChecksumError(ServiceError):
    """A chunk's bytes are not what its checksum says."""

    code, reason = Code.DATA_LOSS, "CHECKSUM"


class DigestError(ServiceError):
    """The rows held are not what the digest says."""

    code, reason = Code.DATA_LOSS, "DIGEST"


class SpillUnreadableError(ServiceError):
    """Keys that were spilled do not come back from disk as they went."""

    code, reason = Code.DATA_LOSS, "SPILL_UNREADABLE"


class QueueFullError(ServiceError):
    """The queue holds as many as it may."""

    code, reason, default_retry_after_ms = Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", 500


class DeadlineUnreachableError(ServiceError):
    """The wait would be longer than the deadline."""

    code, reason, default_retry_after_ms = Code.RESOURCE_EXHAUSTED, "DEADLINE_UNREACHABLE", 500


class HostMemoryError(ServiceError):
    """The host budget is used up."""

    code, reason, default_retry_after_ms = Code.RESOURCE_EXHAUSTED, "HOST_MEMORY", 1000


class HostQuotaError(HostMemoryError):
    """The caller's quota of it is used up."""


class DeviceMemoryError(ServiceError):
    """The device had no memory, even for this request alone."""

    code, reason, default_retry_after_ms = Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", 1000


class TooManyError(ServiceError):
    """More caches or uploads than a bound allows."""

    code, reason, default_retry_after_ms = Code.RESOURCE_EXHAUSTED, "TOO_MANY", 1000


class SlowConsumerError(ServiceError):
    """The caller does not read its answers, or does not send what it announced."""

    code, reason = Code.DEADLINE_EXCEEDED, "SLOW_CONSUMER"


class WorkerLostError(ServiceError):
    """The device process died or hung; a new one starts."""

    code, reason, default_retry_after_ms = Code.UNAVAILABLE, "WORKER_LOST", 250


class NotReadyError(ServiceError):
    """No worker is ready yet."""

    code, reason, default_retry_after_ms = Code.UNAVAILABLE, "NOT_READY", 250


class DrainingError(ServiceError):
    """The server is shutting down."""

    code, reason, default_retry_after_ms = Code.UNAVAILABLE, "DRAINING", 1000


class UnimplementedError(ServiceError):
    """Not in this version."""

    code, reason = Code.UNIMPLEMENTED, "UNIMPLEMENTED"


class InternalError(ServiceError):
    """A defect of ours. The text says nothing; the log does."""

    code, reason = Code.INTERNAL, "INTERNAL"

    def __init__(self, detail: str = "") -> None:
        super().__init__("internal error", detail=detail)


def reasons() -> list[str]:
    """All reasons: a closed set."""
    found: set[str] = set()
    kinds = [*ServiceError.__subclasses__()]
    while kinds:
        kind = kinds.pop()
        found.add(kind.reason)
        kinds += kind.__subclasses__()
    return sorted(found)
