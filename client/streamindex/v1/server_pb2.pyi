from streamindex.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCapabilitiesResponse(_message.Message):
    __slots__ = ("service_version", "device", "implementation", "implementations", "key_formats", "limits", "search_modes", "attention_implementation", "kv_formats")
    SERVICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    IMPLEMENTATION_FIELD_NUMBER: _ClassVar[int]
    IMPLEMENTATIONS_FIELD_NUMBER: _ClassVar[int]
    KEY_FORMATS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SEARCH_MODES_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_IMPLEMENTATION_FIELD_NUMBER: _ClassVar[int]
    KV_FORMATS_FIELD_NUMBER: _ClassVar[int]
    service_version: str
    device: str
    implementation: str
    implementations: _containers.RepeatedCompositeFieldContainer[Implementation]
    key_formats: _containers.RepeatedScalarFieldContainer[_types_pb2.KeyFormat]
    limits: Limits
    search_modes: _containers.RepeatedScalarFieldContainer[_types_pb2.SearchMode]
    attention_implementation: str
    kv_formats: _containers.RepeatedScalarFieldContainer[_types_pb2.KvFormat]
    def __init__(self, service_version: _Optional[str] = ..., device: _Optional[str] = ..., implementation: _Optional[str] = ..., implementations: _Optional[_Iterable[_Union[Implementation, _Mapping]]] = ..., key_formats: _Optional[_Iterable[_Union[_types_pb2.KeyFormat, str]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., search_modes: _Optional[_Iterable[_Union[_types_pb2.SearchMode, str]]] = ..., attention_implementation: _Optional[str] = ..., kv_formats: _Optional[_Iterable[_Union[_types_pb2.KvFormat, str]]] = ...) -> None: ...

class Implementation(_message.Message):
    __slots__ = ("name", "key_formats", "repeatable")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KEY_FORMATS_FIELD_NUMBER: _ClassVar[int]
    REPEATABLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    key_formats: _containers.RepeatedScalarFieldContainer[_types_pb2.KeyFormat]
    repeatable: bool
    def __init__(self, name: _Optional[str] = ..., key_formats: _Optional[_Iterable[_Union[_types_pb2.KeyFormat, str]]] = ..., repeatable: bool = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_heads", "max_head_dim", "max_top_k", "max_layers", "max_layer_keys", "max_chunk_bytes", "max_batch_items", "max_batch_rows", "max_attention_heads", "max_window", "max_given_indices")
    MAX_HEADS_FIELD_NUMBER: _ClassVar[int]
    MAX_HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MAX_LAYER_KEYS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_ITEMS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTENTION_HEADS_FIELD_NUMBER: _ClassVar[int]
    MAX_WINDOW_FIELD_NUMBER: _ClassVar[int]
    MAX_GIVEN_INDICES_FIELD_NUMBER: _ClassVar[int]
    max_heads: int
    max_head_dim: int
    max_top_k: int
    max_layers: int
    max_layer_keys: int
    max_chunk_bytes: int
    max_batch_items: int
    max_batch_rows: int
    max_attention_heads: int
    max_window: int
    max_given_indices: int
    def __init__(self, max_heads: _Optional[int] = ..., max_head_dim: _Optional[int] = ..., max_top_k: _Optional[int] = ..., max_layers: _Optional[int] = ..., max_layer_keys: _Optional[int] = ..., max_chunk_bytes: _Optional[int] = ..., max_batch_items: _Optional[int] = ..., max_batch_rows: _Optional[int] = ..., max_attention_heads: _Optional[int] = ..., max_window: _Optional[int] = ..., max_given_indices: _Optional[int] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("ledgers", "queued_searches", "running_searches", "key_caches", "open_uploads", "worker_restarts", "ready", "device_allocated_bytes", "device_peak_bytes", "uptime_ms", "queue", "device", "device_reserved_bytes", "spill", "residency")
    LEDGERS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_SEARCHES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEARCHES_FIELD_NUMBER: _ClassVar[int]
    KEY_CACHES_FIELD_NUMBER: _ClassVar[int]
    OPEN_UPLOADS_FIELD_NUMBER: _ClassVar[int]
    WORKER_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ALLOCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPTIME_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPILL_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    ledgers: _containers.RepeatedCompositeFieldContainer[Ledger]
    queued_searches: int
    running_searches: int
    key_caches: int
    open_uploads: int
    worker_restarts: int
    ready: bool
    device_allocated_bytes: int
    device_peak_bytes: int
    uptime_ms: int
    queue: QueueLoad
    device: DeviceLoad
    device_reserved_bytes: int
    spill: SpillLoad
    residency: KeyCacheResidency
    def __init__(self, ledgers: _Optional[_Iterable[_Union[Ledger, _Mapping]]] = ..., queued_searches: _Optional[int] = ..., running_searches: _Optional[int] = ..., key_caches: _Optional[int] = ..., open_uploads: _Optional[int] = ..., worker_restarts: _Optional[int] = ..., ready: bool = ..., device_allocated_bytes: _Optional[int] = ..., device_peak_bytes: _Optional[int] = ..., uptime_ms: _Optional[int] = ..., queue: _Optional[_Union[QueueLoad, _Mapping]] = ..., device: _Optional[_Union[DeviceLoad, _Mapping]] = ..., device_reserved_bytes: _Optional[int] = ..., spill: _Optional[_Union[SpillLoad, _Mapping]] = ..., residency: _Optional[_Union[KeyCacheResidency, _Mapping]] = ...) -> None: ...

class KeyCacheResidency(_message.Message):
    __slots__ = ("device", "partial", "none", "spilled")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    NONE_FIELD_NUMBER: _ClassVar[int]
    SPILLED_FIELD_NUMBER: _ClassVar[int]
    device: int
    partial: int
    none: int
    spilled: int
    def __init__(self, device: _Optional[int] = ..., partial: _Optional[int] = ..., none: _Optional[int] = ..., spilled: _Optional[int] = ...) -> None: ...

class SpillLoad(_message.Message):
    __slots__ = ("spilled_pages", "restored_pages")
    SPILLED_PAGES_FIELD_NUMBER: _ClassVar[int]
    RESTORED_PAGES_FIELD_NUMBER: _ClassVar[int]
    spilled_pages: int
    restored_pages: int
    def __init__(self, spilled_pages: _Optional[int] = ..., restored_pages: _Optional[int] = ...) -> None: ...

class QueueLoad(_message.Message):
    __slots__ = ("tiles", "bytes", "estimated_us", "bands", "callers")
    TILES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_US_FIELD_NUMBER: _ClassVar[int]
    BANDS_FIELD_NUMBER: _ClassVar[int]
    CALLERS_FIELD_NUMBER: _ClassVar[int]
    tiles: int
    bytes: int
    estimated_us: int
    bands: _containers.RepeatedCompositeFieldContainer[BandLoad]
    callers: _containers.RepeatedCompositeFieldContainer[CallerLoad]
    def __init__(self, tiles: _Optional[int] = ..., bytes: _Optional[int] = ..., estimated_us: _Optional[int] = ..., bands: _Optional[_Iterable[_Union[BandLoad, _Mapping]]] = ..., callers: _Optional[_Iterable[_Union[CallerLoad, _Mapping]]] = ...) -> None: ...

class BandLoad(_message.Message):
    __slots__ = ("priority", "tiles", "wait")
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    priority: _types_pb2.Priority
    tiles: int
    wait: Latency
    def __init__(self, priority: _Optional[_Union[_types_pb2.Priority, str]] = ..., tiles: _Optional[int] = ..., wait: _Optional[_Union[Latency, _Mapping]] = ...) -> None: ...

class CallerLoad(_message.Message):
    __slots__ = ("caller", "tiles", "estimated_us", "own")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_US_FIELD_NUMBER: _ClassVar[int]
    OWN_FIELD_NUMBER: _ClassVar[int]
    caller: str
    tiles: int
    estimated_us: int
    own: bool
    def __init__(self, caller: _Optional[str] = ..., tiles: _Optional[int] = ..., estimated_us: _Optional[int] = ..., own: bool = ...) -> None: ...

class DeviceLoad(_message.Message):
    __slots__ = ("tiles", "estimated_us", "tiles_done", "busy_us", "resident_bytes", "promoted_pages", "evicted_pages", "wait", "run", "memory", "moved_pages")
    TILES_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_US_FIELD_NUMBER: _ClassVar[int]
    TILES_DONE_FIELD_NUMBER: _ClassVar[int]
    BUSY_US_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_PAGES_FIELD_NUMBER: _ClassVar[int]
    EVICTED_PAGES_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    MOVED_PAGES_FIELD_NUMBER: _ClassVar[int]
    tiles: int
    estimated_us: int
    tiles_done: int
    busy_us: int
    resident_bytes: int
    promoted_pages: int
    evicted_pages: int
    wait: Latency
    run: Latency
    memory: MemoryEstimates
    moved_pages: int
    def __init__(self, tiles: _Optional[int] = ..., estimated_us: _Optional[int] = ..., tiles_done: _Optional[int] = ..., busy_us: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., promoted_pages: _Optional[int] = ..., evicted_pages: _Optional[int] = ..., wait: _Optional[_Union[Latency, _Mapping]] = ..., run: _Optional[_Union[Latency, _Mapping]] = ..., memory: _Optional[_Union[MemoryEstimates, _Mapping]] = ..., moved_pages: _Optional[int] = ...) -> None: ...

class MemoryEstimates(_message.Message):
    __slots__ = ("large_tiles", "last_ratio", "least_ratio", "most_ratio", "most_ratio_of_any", "buckets", "failures")
    LARGE_TILES_FIELD_NUMBER: _ClassVar[int]
    LAST_RATIO_FIELD_NUMBER: _ClassVar[int]
    LEAST_RATIO_FIELD_NUMBER: _ClassVar[int]
    MOST_RATIO_FIELD_NUMBER: _ClassVar[int]
    MOST_RATIO_OF_ANY_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    large_tiles: int
    last_ratio: float
    least_ratio: float
    most_ratio: float
    most_ratio_of_any: float
    buckets: _containers.RepeatedCompositeFieldContainer[RatioBucket]
    failures: int
    def __init__(self, large_tiles: _Optional[int] = ..., last_ratio: _Optional[float] = ..., least_ratio: _Optional[float] = ..., most_ratio: _Optional[float] = ..., most_ratio_of_any: _Optional[float] = ..., buckets: _Optional[_Iterable[_Union[RatioBucket, _Mapping]]] = ..., failures: _Optional[int] = ...) -> None: ...

class RatioBucket(_message.Message):
    __slots__ = ("bound", "tiles")
    BOUND_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    bound: float
    tiles: int
    def __init__(self, bound: _Optional[float] = ..., tiles: _Optional[int] = ...) -> None: ...

class Latency(_message.Message):
    __slots__ = ("p50_us", "p99_us")
    P50_US_FIELD_NUMBER: _ClassVar[int]
    P99_US_FIELD_NUMBER: _ClassVar[int]
    p50_us: int
    p99_us: int
    def __init__(self, p50_us: _Optional[int] = ..., p99_us: _Optional[int] = ...) -> None: ...

class Ledger(_message.Message):
    __slots__ = ("name", "limit_bytes", "reserved_bytes", "peak_bytes", "spare_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPARE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    limit_bytes: int
    reserved_bytes: int
    peak_bytes: int
    spare_bytes: int
    def __init__(self, name: _Optional[str] = ..., limit_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., spare_bytes: _Optional[int] = ...) -> None: ...

class WatchLoadRequest(_message.Message):
    __slots__ = ("interval_ms",)
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    interval_ms: int
    def __init__(self, interval_ms: _Optional[int] = ...) -> None: ...

class WatchLoadResponse(_message.Message):
    __slots__ = ("load",)
    LOAD_FIELD_NUMBER: _ClassVar[int]
    load: GetLoadResponse
    def __init__(self, load: _Optional[_Union[GetLoadResponse, _Mapping]] = ...) -> None: ...
