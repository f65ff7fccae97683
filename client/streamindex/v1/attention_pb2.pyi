from streamindex.v1 import key_cache_pb2 as _key_cache_pb2
from streamindex.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SparseAttendRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: SparseAttendHeader
    chunk: AttendChunk
    def __init__(self, header: _Optional[_Union[SparseAttendHeader, _Mapping]] = ..., chunk: _Optional[_Union[AttendChunk, _Mapping]] = ...) -> None: ...

class SparseAttendHeader(_message.Message):
    __slots__ = ("key_cache_id", "layer", "top_k", "given_indices", "all_visible", "query_format", "convention", "start_position", "explicit_positions", "window", "scale", "sink", "want_lse", "priority", "row_count", "request_key", "expected_layer_version")
    KEY_CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    GIVEN_INDICES_FIELD_NUMBER: _ClassVar[int]
    ALL_VISIBLE_FIELD_NUMBER: _ClassVar[int]
    QUERY_FORMAT_FIELD_NUMBER: _ClassVar[int]
    CONVENTION_FIELD_NUMBER: _ClassVar[int]
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    EXPLICIT_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SINK_FIELD_NUMBER: _ClassVar[int]
    WANT_LSE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_LAYER_VERSION_FIELD_NUMBER: _ClassVar[int]
    key_cache_id: str
    layer: int
    top_k: int
    given_indices: int
    all_visible: bool
    query_format: _types_pb2.KeyFormat
    convention: str
    start_position: int
    explicit_positions: bool
    window: int
    scale: float
    sink: _containers.RepeatedScalarFieldContainer[float]
    want_lse: bool
    priority: _types_pb2.Priority
    row_count: int
    request_key: str
    expected_layer_version: int
    def __init__(self, key_cache_id: _Optional[str] = ..., layer: _Optional[int] = ..., top_k: _Optional[int] = ..., given_indices: _Optional[int] = ..., all_visible: bool = ..., query_format: _Optional[_Union[_types_pb2.KeyFormat, str]] = ..., convention: _Optional[str] = ..., start_position: _Optional[int] = ..., explicit_positions: bool = ..., window: _Optional[int] = ..., scale: _Optional[float] = ..., sink: _Optional[_Iterable[float]] = ..., want_lse: bool = ..., priority: _Optional[_Union[_types_pb2.Priority, str]] = ..., row_count: _Optional[int] = ..., request_key: _Optional[str] = ..., expected_layer_version: _Optional[int] = ...) -> None: ...

class AttendChunk(_message.Message):
    __slots__ = ("row_offset", "row_count", "q", "index_q", "index_w", "indices", "positions", "crc32c")
    ROW_OFFSET_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    INDEX_Q_FIELD_NUMBER: _ClassVar[int]
    INDEX_W_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    row_offset: int
    row_count: int
    q: bytes
    index_q: bytes
    index_w: bytes
    indices: bytes
    positions: bytes
    crc32c: int
    def __init__(self, row_offset: _Optional[int] = ..., row_count: _Optional[int] = ..., q: _Optional[bytes] = ..., index_q: _Optional[bytes] = ..., index_w: _Optional[bytes] = ..., indices: _Optional[bytes] = ..., positions: _Optional[bytes] = ..., crc32c: _Optional[int] = ...) -> None: ...

class SparseAttendResponse(_message.Message):
    __slots__ = ("accepted", "chunk", "refused", "done")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    accepted: SparseAttendAccepted
    chunk: OutputChunk
    refused: _types_pb2.Error
    done: SparseAttendDone
    def __init__(self, accepted: _Optional[_Union[SparseAttendAccepted, _Mapping]] = ..., chunk: _Optional[_Union[OutputChunk, _Mapping]] = ..., refused: _Optional[_Union[_types_pb2.Error, _Mapping]] = ..., done: _Optional[_Union[SparseAttendDone, _Mapping]] = ...) -> None: ...

class SparseAttendAccepted(_message.Message):
    __slots__ = ("layer_keys", "kv_rows", "window_rows", "implementation", "max_chunk_bytes", "layer_version")
    LAYER_KEYS_FIELD_NUMBER: _ClassVar[int]
    KV_ROWS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_ROWS_FIELD_NUMBER: _ClassVar[int]
    IMPLEMENTATION_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYER_VERSION_FIELD_NUMBER: _ClassVar[int]
    layer_keys: int
    kv_rows: int
    window_rows: int
    implementation: str
    max_chunk_bytes: int
    layer_version: int
    def __init__(self, layer_keys: _Optional[int] = ..., kv_rows: _Optional[int] = ..., window_rows: _Optional[int] = ..., implementation: _Optional[str] = ..., max_chunk_bytes: _Optional[int] = ..., layer_version: _Optional[int] = ...) -> None: ...

class OutputChunk(_message.Message):
    __slots__ = ("row_offset", "row_count", "out", "lse", "crc32c")
    ROW_OFFSET_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    OUT_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    row_offset: int
    row_count: int
    out: bytes
    lse: bytes
    crc32c: int
    def __init__(self, row_offset: _Optional[int] = ..., row_count: _Optional[int] = ..., out: _Optional[bytes] = ..., lse: _Optional[bytes] = ..., crc32c: _Optional[int] = ...) -> None: ...

class SparseAttendDone(_message.Message):
    __slots__ = ("row_count", "device_us", "queued_ms")
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUED_MS_FIELD_NUMBER: _ClassVar[int]
    row_count: int
    device_us: int
    queued_ms: int
    def __init__(self, row_count: _Optional[int] = ..., device_us: _Optional[int] = ..., queued_ms: _Optional[int] = ...) -> None: ...

class SparseAttendBatchRequest(_message.Message):
    __slots__ = ("items", "top_k", "given_indices", "all_visible", "window", "scale", "sink", "want_lse", "want_indices", "priority")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    GIVEN_INDICES_FIELD_NUMBER: _ClassVar[int]
    ALL_VISIBLE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SINK_FIELD_NUMBER: _ClassVar[int]
    WANT_LSE_FIELD_NUMBER: _ClassVar[int]
    WANT_INDICES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[SparseAttendBatchItem]
    top_k: int
    given_indices: int
    all_visible: bool
    window: int
    scale: float
    sink: _containers.RepeatedScalarFieldContainer[float]
    want_lse: bool
    want_indices: bool
    priority: _types_pb2.Priority
    def __init__(self, items: _Optional[_Iterable[_Union[SparseAttendBatchItem, _Mapping]]] = ..., top_k: _Optional[int] = ..., given_indices: _Optional[int] = ..., all_visible: bool = ..., window: _Optional[int] = ..., scale: _Optional[float] = ..., sink: _Optional[_Iterable[float]] = ..., want_lse: bool = ..., want_indices: bool = ..., priority: _Optional[_Union[_types_pb2.Priority, str]] = ...) -> None: ...

class SparseAttendBatchItem(_message.Message):
    __slots__ = ("key_cache_id", "layer", "query_format", "convention", "row_count", "q", "index_q", "index_w", "indices", "positions", "appends")
    class Append(_message.Message):
        __slots__ = ("row_kind", "first_row", "row_count", "rows", "scales")
        ROW_KIND_FIELD_NUMBER: _ClassVar[int]
        FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
        ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
        ROWS_FIELD_NUMBER: _ClassVar[int]
        SCALES_FIELD_NUMBER: _ClassVar[int]
        row_kind: _key_cache_pb2.RowKind
        first_row: int
        row_count: int
        rows: bytes
        scales: bytes
        def __init__(self, row_kind: _Optional[_Union[_key_cache_pb2.RowKind, str]] = ..., first_row: _Optional[int] = ..., row_count: _Optional[int] = ..., rows: _Optional[bytes] = ..., scales: _Optional[bytes] = ...) -> None: ...
    KEY_CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    QUERY_FORMAT_FIELD_NUMBER: _ClassVar[int]
    CONVENTION_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    INDEX_Q_FIELD_NUMBER: _ClassVar[int]
    INDEX_W_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    APPENDS_FIELD_NUMBER: _ClassVar[int]
    key_cache_id: str
    layer: int
    query_format: _types_pb2.KeyFormat
    convention: str
    row_count: int
    q: bytes
    index_q: bytes
    index_w: bytes
    indices: bytes
    positions: _containers.RepeatedScalarFieldContainer[int]
    appends: _containers.RepeatedCompositeFieldContainer[SparseAttendBatchItem.Append]
    def __init__(self, key_cache_id: _Optional[str] = ..., layer: _Optional[int] = ..., query_format: _Optional[_Union[_types_pb2.KeyFormat, str]] = ..., convention: _Optional[str] = ..., row_count: _Optional[int] = ..., q: _Optional[bytes] = ..., index_q: _Optional[bytes] = ..., index_w: _Optional[bytes] = ..., indices: _Optional[bytes] = ..., positions: _Optional[_Iterable[int]] = ..., appends: _Optional[_Iterable[_Union[SparseAttendBatchItem.Append, _Mapping]]] = ...) -> None: ...

class SparseAttendBatchResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[SparseAttendBatchResult]
    def __init__(self, results: _Optional[_Iterable[_Union[SparseAttendBatchResult, _Mapping]]] = ...) -> None: ...

class SparseAttendBatchResult(_message.Message):
    __slots__ = ("out", "lse", "indices", "error", "layer_keys", "kv_rows", "window_rows")
    OUT_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LAYER_KEYS_FIELD_NUMBER: _ClassVar[int]
    KV_ROWS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_ROWS_FIELD_NUMBER: _ClassVar[int]
    out: bytes
    lse: bytes
    indices: bytes
    error: _types_pb2.Error
    layer_keys: int
    kv_rows: int
    window_rows: int
    def __init__(self, out: _Optional[bytes] = ..., lse: _Optional[bytes] = ..., indices: _Optional[bytes] = ..., error: _Optional[_Union[_types_pb2.Error, _Mapping]] = ..., layer_keys: _Optional[int] = ..., kv_rows: _Optional[int] = ..., window_rows: _Optional[int] = ...) -> None: ...

class AttendRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AttendResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
