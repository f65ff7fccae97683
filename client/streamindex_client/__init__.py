"""Client of StreamIndex Service: key caches, streamed search, top-k indices; blocking and asyncio.

    with streamindex_client.connect("unix:///run/streamindex.sock") as client:
        cache = client.create_key_cache(heads=64, head_dim=128, ratio=4, key_format="bf16", layers=21)
        cache.append(layer=0, keys=k)                                   # [keys, head_dim]
        for part in cache.search(layer=0, q=q, w=w, top_k=512, start_position=0):
            part.indices                                                # [rows, top_k] int32

A cache made with a `KvSpec` holds KV rows too, over which `sparse_attend` computes attention.

The protocol is written once, without I/O (`operations`, `upload`, `row_session`, `retry`); `sync_driver` and
`aio_driver` interpret it.
"""

from streamindex_client.aio_client import (
    AsyncAttendStream,
    AsyncClient,
    AsyncKeyCache,
    AsyncSearchStream,
    connect_async,
)
from streamindex_client.attend import AttendPart, AttendSummary
from streamindex_client.attend_batch import AttendBatchItem, AttendBatchResult
from streamindex_client.batch import BatchItem, BatchResult
from streamindex_client.client import AttendStream, Client, KeyCache, SearchStream, connect
from streamindex_client.credentials import Tls
from streamindex_client.errors import (
    AuthenticationError,
    CancelledCallError,
    ConventionMismatchError,
    DataLossError,
    DeadlineError,
    ExceedsBudgetError,
    FailedPreconditionError,
    InputError,
    InternalError,
    InvalidRequestError,
    NonFiniteError,
    NotFoundError,
    OffsetGapError,
    PermissionDeniedError,
    PoisonError,
    ProtocolError,
    ResourceExhaustedError,
    SlowConsumerError,
    StreamIndexError,
    UnavailableError,
    UnimplementedError,
    UploadConflictError,
    WorkerLostError,
)
from streamindex_client.formats import KeyFormat, KvFormat, Priority, ResultOrder, SearchMode
from streamindex_client.handles import AttendResult, SearchResult
from streamindex_client.model import (
    CacheResidency,
    Capabilities,
    Implementation,
    KeyCacheInfo,
    KeyCacheSpec,
    KvSpec,
    Ledger,
    Load,
    UploadState,
)
from streamindex_client.options import ClientOptions, RetryPolicy
from streamindex_client.search import SearchPart, SearchSummary

__all__ = [
    "AsyncAttendStream",
    "AsyncClient",
    "AsyncKeyCache",
    "AsyncSearchStream",
    "AttendBatchItem",
    "AttendBatchResult",
    "AttendPart",
    "AttendResult",
    "AttendStream",
    "AttendSummary",
    "AuthenticationError",
    "BatchItem",
    "BatchResult",
    "CacheResidency",
    "CancelledCallError",
    "Capabilities",
    "Client",
    "ClientOptions",
    "ConventionMismatchError",
    "DataLossError",
    "DeadlineError",
    "ExceedsBudgetError",
    "FailedPreconditionError",
    "Implementation",
    "InputError",
    "InternalError",
    "InvalidRequestError",
    "KeyCache",
    "KeyCacheInfo",
    "KeyCacheSpec",
    "KeyFormat",
    "KvFormat",
    "KvSpec",
    "Ledger",
    "Load",
    "NonFiniteError",
    "NotFoundError",
    "OffsetGapError",
    "PermissionDeniedError",
    "PoisonError",
    "Priority",
    "ProtocolError",
    "ResourceExhaustedError",
    "ResultOrder",
    "RetryPolicy",
    "SearchMode",
    "SearchPart",
    "SearchResult",
    "SearchStream",
    "SearchSummary",
    "SlowConsumerError",
    "StreamIndexError",
    "Tls",
    "UnavailableError",
    "UnimplementedError",
    "UploadConflictError",
    "UploadState",
    "WorkerLostError",
    "connect",
    "connect_async",
]
