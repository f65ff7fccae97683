from streamindex.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SearchRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: SearchHeader
    chunk: QueryChunk
    def __init__(self, header: _Optional[_Union[SearchHeader, _Mapping]] = ..., chunk: _Optional[_Union[QueryChunk, _Mapping]] = ...) -> None: ...

class SearchHeader(_message.Message):
    __slots__ = ("key_cache_id", "layer", "top_k", "query_format", "convention", "start_position", "explicit_positions", "mode", "order", "want_scores", "priority", "row_count", "request_key", "expected_layer_version")
    KEY_CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    QUERY_FORMAT_FIELD_NUMBER: _ClassVar[int]
    CONVENTION_FIELD_NUMBER: _ClassVar[int]
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    EXPLICIT_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    WANT_SCORES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_LAYER_VERSION_FIELD_NUMBER: _ClassVar[int]
    key_cache_id: str
    layer: int
    top_k: int
    query_format: _types_pb2.KeyFormat
    convention: str
    start_position: int
    explicit_positions: bool
    mode: _types_pb2.SearchMode
    order: _types_pb2.ResultOrder
    want_scores: bool
    priority: _types_pb2.Priority
    row_count: int
    request_key: str
    expected_layer_version: int
    def __init__(self, key_cache_id: _Optional[str] = ..., layer: _Optional[int] = ..., top_k: _Optional[int] = ..., query_format: _Optional[_Union[_types_pb2.KeyFormat, str]] = ..., convention: _Optional[str] = ..., start_position: _Optional[int] = ..., explicit_positions: bool = ..., mode: _Optional[_Union[_types_pb2.SearchMode, str]] = ..., order: _Optional[_Union[_types_pb2.ResultOrder, str]] = ..., want_scores: bool = ..., priority: _Optional[_Union[_types_pb2.Priority, str]] = ..., row_count: _Optional[int] = ..., request_key: _Optional[str] = ..., expected_layer_version: _Optional[int] = ...) -> None: ...

class QueryChunk(_message.Message):
    __slots__ = ("row_offset", "row_count", "q", "w", "positions", "crc32c")
    ROW_OFFSET_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    W_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    row_offset: int
    row_count: int
    q: bytes
    w: bytes
    positions: bytes
    crc32c: int
    def __init__(self, row_offset: _Optional[int] = ..., row_count: _Optional[int] = ..., q: _Optional[bytes] = ..., w: _Optional[bytes] = ..., positions: _Optional[bytes] = ..., crc32c: _Optional[int] = ...) -> None: ...

class SearchResponse(_message.Message):
    __slots__ = ("accepted", "chunk", "refused", "done")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    accepted: SearchAccepted
    chunk: IndexChunk
    refused: _types_pb2.Error
    done: SearchDone
    def __init__(self, accepted: _Optional[_Union[SearchAccepted, _Mapping]] = ..., chunk: _Optional[_Union[IndexChunk, _Mapping]] = ..., refused: _Optional[_Union[_types_pb2.Error, _Mapping]] = ..., done: _Optional[_Union[SearchDone, _Mapping]] = ...) -> None: ...

class SearchAccepted(_message.Message):
    __slots__ = ("layer_keys", "implementation", "max_chunk_bytes", "layer_version")
    LAYER_KEYS_FIELD_NUMBER: _ClassVar[int]
    IMPLEMENTATION_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYER_VERSION_FIELD_NUMBER: _ClassVar[int]
    layer_keys: int
    implementation: str
    max_chunk_bytes: int
    layer_version: int
    def __init__(self, layer_keys: _Optional[int] = ..., implementation: _Optional[str] = ..., max_chunk_bytes: _Optional[int] = ..., layer_version: _Optional[int] = ...) -> None: ...

class IndexChunk(_message.Message):
    __slots__ = ("row_offset", "row_count", "indices", "scores", "crc32c")
    ROW_OFFSET_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    row_offset: int
    row_count: int
    indices: bytes
    scores: bytes
    crc32c: int
    def __init__(self, row_offset: _Optional[int] = ..., row_count: _Optional[int] = ..., indices: _Optional[bytes] = ..., scores: _Optional[bytes] = ..., crc32c: _Optional[int] = ...) -> None: ...

class SearchDone(_message.Message):
    __slots__ = ("row_count", "device_us", "queued_ms")
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUED_MS_FIELD_NUMBER: _ClassVar[int]
    row_count: int
    device_us: int
    queued_ms: int
    def __init__(self, row_count: _Optional[int] = ..., device_us: _Optional[int] = ..., queued_ms: _Optional[int] = ...) -> None: ...

class SearchBatchRequest(_message.Message):
    __slots__ = ("items", "top_k", "order", "want_scores", "mode", "priority")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    WANT_SCORES_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[SearchBatchItem]
    top_k: int
    order: _types_pb2.ResultOrder
    want_scores: bool
    mode: _types_pb2.SearchMode
    priority: _types_pb2.Priority
    def __init__(self, items: _Optional[_Iterable[_Union[SearchBatchItem, _Mapping]]] = ..., top_k: _Optional[int] = ..., order: _Optional[_Union[_types_pb2.ResultOrder, str]] = ..., want_scores: bool = ..., mode: _Optional[_Union[_types_pb2.SearchMode, str]] = ..., priority: _Optional[_Union[_types_pb2.Priority, str]] = ...) -> None: ...

class SearchBatchItem(_message.Message):
    __slots__ = ("key_cache_id", "layer", "query_format", "convention", "row_count", "q", "w", "positions", "append")
    class Append(_message.Message):
        __slots__ = ("first_row", "row_count", "keys", "scales")
        FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
        ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
        KEYS_FIELD_NUMBER: _ClassVar[int]
        SCALES_FIELD_NUMBER: _ClassVar[int]
        first_row: int
        row_count: int
        keys: bytes
        scales: bytes
        def __init__(self, first_row: _Optional[int] = ..., row_count: _Optional[int] = ..., keys: _Optional[bytes] = ..., scales: _Optional[bytes] = ...) -> None: ...
    KEY_CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    QUERY_FORMAT_FIELD_NUMBER: _ClassVar[int]
    CONVENTION_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    W_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    APPEND_FIELD_NUMBER: _ClassVar[int]
    key_cache_id: str
    layer: int
    query_format: _types_pb2.KeyFormat
    convention: str
    row_count: int
    q: bytes
    w: bytes
    positions: _containers.RepeatedScalarFieldContainer[int]
    append: SearchBatchItem.Append
    def __init__(self, key_cache_id: _Optional[str] = ..., layer: _Optional[int] = ..., query_format: _Optional[_Union[_types_pb2.KeyFormat, str]] = ..., convention: _Optional[str] = ..., row_count: _Optional[int] = ..., q: _Optional[bytes] = ..., w: _Optional[bytes] = ..., positions: _Optional[_Iterable[int]] = ..., append: _Optional[_Union[SearchBatchItem.Append, _Mapping]] = ...) -> None: ...

class SearchBatchResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[SearchBatchResult]
    def __init__(self, results: _Optional[_Iterable[_Union[SearchBatchResult, _Mapping]]] = ...) -> None: ...

class SearchBatchResult(_message.Message):
    __slots__ = ("indices", "scores", "layer_keys", "error")
    INDICES_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    LAYER_KEYS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    indices: bytes
    scores: bytes
    layer_keys: int
    error: _types_pb2.Error
    def __init__(self, indices: _Optional[bytes] = ..., scores: _Optional[bytes] = ..., layer_keys: _Optional[int] = ..., error: _Optional[_Union[_types_pb2.Error, _Mapping]] = ...) -> None: ...
