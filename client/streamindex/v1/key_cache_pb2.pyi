from streamindex.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RowKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROW_KIND_UNSPECIFIED: _ClassVar[RowKind]
    ROW_KIND_KEYS: _ClassVar[RowKind]
    ROW_KIND_KV: _ClassVar[RowKind]
    ROW_KIND_WINDOW: _ClassVar[RowKind]
ROW_KIND_UNSPECIFIED: RowKind
ROW_KIND_KEYS: RowKind
ROW_KIND_KV: RowKind
ROW_KIND_WINDOW: RowKind

class KeyCacheSpec(_message.Message):
    __slots__ = ("heads", "head_dim", "ratio", "key_format", "layers", "convention", "expected_keys", "idle_ttl_s", "priority", "kv")
    HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    RATIO_FIELD_NUMBER: _ClassVar[int]
    KEY_FORMAT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    CONVENTION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_KEYS_FIELD_NUMBER: _ClassVar[int]
    IDLE_TTL_S_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    heads: int
    head_dim: int
    ratio: int
    key_format: _types_pb2.KeyFormat
    layers: int
    convention: str
    expected_keys: int
    idle_ttl_s: int
    priority: _types_pb2.Priority
    kv: KvSpec
    def __init__(self, heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., ratio: _Optional[int] = ..., key_format: _Optional[_Union[_types_pb2.KeyFormat, str]] = ..., layers: _Optional[int] = ..., convention: _Optional[str] = ..., expected_keys: _Optional[int] = ..., idle_ttl_s: _Optional[int] = ..., priority: _Optional[_Union[_types_pb2.Priority, str]] = ..., kv: _Optional[_Union[KvSpec, _Mapping]] = ...) -> None: ...

class KvSpec(_message.Message):
    __slots__ = ("kv_format", "key_dim", "value_dim", "heads")
    KV_FORMAT_FIELD_NUMBER: _ClassVar[int]
    KEY_DIM_FIELD_NUMBER: _ClassVar[int]
    VALUE_DIM_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    kv_format: _types_pb2.KvFormat
    key_dim: int
    value_dim: int
    heads: int
    def __init__(self, kv_format: _Optional[_Union[_types_pb2.KvFormat, str]] = ..., key_dim: _Optional[int] = ..., value_dim: _Optional[int] = ..., heads: _Optional[int] = ...) -> None: ...

class KeyCache(_message.Message):
    __slots__ = ("id", "spec", "layer_keys", "host_bytes", "resident_bytes", "spilled_bytes", "layer_kv_rows", "layer_window_rows")
    ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    LAYER_KEYS_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPILLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYER_KV_ROWS_FIELD_NUMBER: _ClassVar[int]
    LAYER_WINDOW_ROWS_FIELD_NUMBER: _ClassVar[int]
    id: str
    spec: KeyCacheSpec
    layer_keys: _containers.RepeatedScalarFieldContainer[int]
    host_bytes: int
    resident_bytes: int
    spilled_bytes: int
    layer_kv_rows: _containers.RepeatedScalarFieldContainer[int]
    layer_window_rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, id: _Optional[str] = ..., spec: _Optional[_Union[KeyCacheSpec, _Mapping]] = ..., layer_keys: _Optional[_Iterable[int]] = ..., host_bytes: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., spilled_bytes: _Optional[int] = ..., layer_kv_rows: _Optional[_Iterable[int]] = ..., layer_window_rows: _Optional[_Iterable[int]] = ...) -> None: ...

class CreateKeyCacheRequest(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: KeyCacheSpec
    def __init__(self, spec: _Optional[_Union[KeyCacheSpec, _Mapping]] = ...) -> None: ...

class CreateKeyCacheResponse(_message.Message):
    __slots__ = ("key_cache",)
    KEY_CACHE_FIELD_NUMBER: _ClassVar[int]
    key_cache: KeyCache
    def __init__(self, key_cache: _Optional[_Union[KeyCache, _Mapping]] = ...) -> None: ...

class GetKeyCacheRequest(_message.Message):
    __slots__ = ("key_cache_id",)
    KEY_CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    key_cache_id: str
    def __init__(self, key_cache_id: _Optional[str] = ...) -> None: ...

class GetKeyCacheResponse(_message.Message):
    __slots__ = ("key_cache",)
    KEY_CACHE_FIELD_NUMBER: _ClassVar[int]
    key_cache: KeyCache
    def __init__(self, key_cache: _Optional[_Union[KeyCache, _Mapping]] = ...) -> None: ...

class ListKeyCachesRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListKeyCachesResponse(_message.Message):
    __slots__ = ("key_caches", "next_page_token")
    KEY_CACHES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    key_caches: _containers.RepeatedCompositeFieldContainer[KeyCache]
    next_page_token: str
    def __init__(self, key_caches: _Optional[_Iterable[_Union[KeyCache, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteKeyCacheRequest(_message.Message):
    __slots__ = ("key_cache_id",)
    KEY_CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    key_cache_id: str
    def __init__(self, key_cache_id: _Optional[str] = ...) -> None: ...

class DeleteKeyCacheResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TruncateKeysRequest(_message.Message):
    __slots__ = ("key_cache_id", "layer", "keys", "window_rows")
    KEY_CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_ROWS_FIELD_NUMBER: _ClassVar[int]
    key_cache_id: str
    layer: int
    keys: int
    window_rows: int
    def __init__(self, key_cache_id: _Optional[str] = ..., layer: _Optional[int] = ..., keys: _Optional[int] = ..., window_rows: _Optional[int] = ...) -> None: ...

class TruncateKeysResponse(_message.Message):
    __slots__ = ("key_cache",)
    KEY_CACHE_FIELD_NUMBER: _ClassVar[int]
    key_cache: KeyCache
    def __init__(self, key_cache: _Optional[_Union[KeyCache, _Mapping]] = ...) -> None: ...

class ForkKeyCacheRequest(_message.Message):
    __slots__ = ("key_cache_id", "keys", "window_rows")
    KEY_CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_ROWS_FIELD_NUMBER: _ClassVar[int]
    key_cache_id: str
    keys: int
    window_rows: int
    def __init__(self, key_cache_id: _Optional[str] = ..., keys: _Optional[int] = ..., window_rows: _Optional[int] = ...) -> None: ...

class ForkKeyCacheResponse(_message.Message):
    __slots__ = ("key_cache",)
    KEY_CACHE_FIELD_NUMBER: _ClassVar[int]
    key_cache: KeyCache
    def __init__(self, key_cache: _Optional[_Union[KeyCache, _Mapping]] = ...) -> None: ...

class AppendKeysRequest(_message.Message):
    __slots__ = ("header", "chunk", "finish")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    header: AppendKeysHeader
    chunk: KeyChunk
    finish: AppendKeysFinish
    def __init__(self, header: _Optional[_Union[AppendKeysHeader, _Mapping]] = ..., chunk: _Optional[_Union[KeyChunk, _Mapping]] = ..., finish: _Optional[_Union[AppendKeysFinish, _Mapping]] = ...) -> None: ...

class AppendKeysHeader(_message.Message):
    __slots__ = ("start", "resume_upload_id")
    class Start(_message.Message):
        __slots__ = ("key_cache_id", "layer", "first_row", "row_count", "row_kind")
        KEY_CACHE_ID_FIELD_NUMBER: _ClassVar[int]
        LAYER_FIELD_NUMBER: _ClassVar[int]
        FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
        ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
        ROW_KIND_FIELD_NUMBER: _ClassVar[int]
        key_cache_id: str
        layer: int
        first_row: int
        row_count: int
        row_kind: RowKind
        def __init__(self, key_cache_id: _Optional[str] = ..., layer: _Optional[int] = ..., first_row: _Optional[int] = ..., row_count: _Optional[int] = ..., row_kind: _Optional[_Union[RowKind, str]] = ...) -> None: ...
    START_FIELD_NUMBER: _ClassVar[int]
    RESUME_UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    start: AppendKeysHeader.Start
    resume_upload_id: str
    def __init__(self, start: _Optional[_Union[AppendKeysHeader.Start, _Mapping]] = ..., resume_upload_id: _Optional[str] = ...) -> None: ...

class KeyChunk(_message.Message):
    __slots__ = ("row_offset", "row_count", "keys", "scales", "crc32c")
    ROW_OFFSET_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    row_offset: int
    row_count: int
    keys: bytes
    scales: bytes
    crc32c: int
    def __init__(self, row_offset: _Optional[int] = ..., row_count: _Optional[int] = ..., keys: _Optional[bytes] = ..., scales: _Optional[bytes] = ..., crc32c: _Optional[int] = ...) -> None: ...

class AppendKeysFinish(_message.Message):
    __slots__ = ("row_count", "keys_crc32c", "scales_crc32c")
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    KEYS_CRC32C_FIELD_NUMBER: _ClassVar[int]
    SCALES_CRC32C_FIELD_NUMBER: _ClassVar[int]
    row_count: int
    keys_crc32c: int
    scales_crc32c: int
    def __init__(self, row_count: _Optional[int] = ..., keys_crc32c: _Optional[int] = ..., scales_crc32c: _Optional[int] = ...) -> None: ...

class AppendKeysResponse(_message.Message):
    __slots__ = ("accepted", "acknowledged", "committed", "refused")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    accepted: UploadAccepted
    acknowledged: UploadAcknowledged
    committed: UploadCommitted
    refused: _types_pb2.Error
    def __init__(self, accepted: _Optional[_Union[UploadAccepted, _Mapping]] = ..., acknowledged: _Optional[_Union[UploadAcknowledged, _Mapping]] = ..., committed: _Optional[_Union[UploadCommitted, _Mapping]] = ..., refused: _Optional[_Union[_types_pb2.Error, _Mapping]] = ...) -> None: ...

class UploadAccepted(_message.Message):
    __slots__ = ("upload_id", "row_offset", "max_chunk_bytes", "window_bytes")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    ROW_OFFSET_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    row_offset: int
    max_chunk_bytes: int
    window_bytes: int
    def __init__(self, upload_id: _Optional[str] = ..., row_offset: _Optional[int] = ..., max_chunk_bytes: _Optional[int] = ..., window_bytes: _Optional[int] = ...) -> None: ...

class UploadAcknowledged(_message.Message):
    __slots__ = ("row_offset",)
    ROW_OFFSET_FIELD_NUMBER: _ClassVar[int]
    row_offset: int
    def __init__(self, row_offset: _Optional[int] = ...) -> None: ...

class UploadCommitted(_message.Message):
    __slots__ = ("layer_keys",)
    LAYER_KEYS_FIELD_NUMBER: _ClassVar[int]
    layer_keys: int
    def __init__(self, layer_keys: _Optional[int] = ...) -> None: ...

class QueryUploadRequest(_message.Message):
    __slots__ = ("upload_id",)
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    def __init__(self, upload_id: _Optional[str] = ...) -> None: ...

class QueryUploadResponse(_message.Message):
    __slots__ = ("row_offset", "committed")
    ROW_OFFSET_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    row_offset: int
    committed: bool
    def __init__(self, row_offset: _Optional[int] = ..., committed: bool = ...) -> None: ...
