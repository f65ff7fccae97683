from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FailureKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_KIND_UNSPECIFIED: _ClassVar[FailureKind]
    FAILURE_KIND_CANCELLED: _ClassVar[FailureKind]
    FAILURE_KIND_OUT_OF_MEMORY: _ClassVar[FailureKind]
    FAILURE_KIND_DEVICE: _ClassVar[FailureKind]
    FAILURE_KIND_INTERNAL: _ClassVar[FailureKind]
    FAILURE_KIND_UNUSABLE: _ClassVar[FailureKind]
FAILURE_KIND_UNSPECIFIED: FailureKind
FAILURE_KIND_CANCELLED: FailureKind
FAILURE_KIND_OUT_OF_MEMORY: FailureKind
FAILURE_KIND_DEVICE: FailureKind
FAILURE_KIND_INTERNAL: FailureKind
FAILURE_KIND_UNUSABLE: FailureKind

class ToWorker(_message.Message):
    __slots__ = ("configure", "map_segment", "unmap_segment", "allocate_extent", "free_extent", "load_pages", "define_views", "drop_views", "search_tile", "cancel_tiles", "ping", "shutdown", "attend_tile")
    CONFIGURE_FIELD_NUMBER: _ClassVar[int]
    MAP_SEGMENT_FIELD_NUMBER: _ClassVar[int]
    UNMAP_SEGMENT_FIELD_NUMBER: _ClassVar[int]
    ALLOCATE_EXTENT_FIELD_NUMBER: _ClassVar[int]
    FREE_EXTENT_FIELD_NUMBER: _ClassVar[int]
    LOAD_PAGES_FIELD_NUMBER: _ClassVar[int]
    DEFINE_VIEWS_FIELD_NUMBER: _ClassVar[int]
    DROP_VIEWS_FIELD_NUMBER: _ClassVar[int]
    SEARCH_TILE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_TILES_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    SHUTDOWN_FIELD_NUMBER: _ClassVar[int]
    ATTEND_TILE_FIELD_NUMBER: _ClassVar[int]
    configure: Configure
    map_segment: MapSegment
    unmap_segment: UnmapSegment
    allocate_extent: AllocateExtent
    free_extent: FreeExtent
    load_pages: LoadPages
    define_views: DefineViews
    drop_views: DropViews
    search_tile: SearchTile
    cancel_tiles: CancelTiles
    ping: Ping
    shutdown: Shutdown
    attend_tile: AttendTile
    def __init__(self, configure: _Optional[_Union[Configure, _Mapping]] = ..., map_segment: _Optional[_Union[MapSegment, _Mapping]] = ..., unmap_segment: _Optional[_Union[UnmapSegment, _Mapping]] = ..., allocate_extent: _Optional[_Union[AllocateExtent, _Mapping]] = ..., free_extent: _Optional[_Union[FreeExtent, _Mapping]] = ..., load_pages: _Optional[_Union[LoadPages, _Mapping]] = ..., define_views: _Optional[_Union[DefineViews, _Mapping]] = ..., drop_views: _Optional[_Union[DropViews, _Mapping]] = ..., search_tile: _Optional[_Union[SearchTile, _Mapping]] = ..., cancel_tiles: _Optional[_Union[CancelTiles, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., shutdown: _Optional[_Union[Shutdown, _Mapping]] = ..., attend_tile: _Optional[_Union[AttendTile, _Mapping]] = ...) -> None: ...

class FromWorker(_message.Message):
    __slots__ = ("ready", "operation_done", "tile_done", "failed", "pong")
    READY_FIELD_NUMBER: _ClassVar[int]
    OPERATION_DONE_FIELD_NUMBER: _ClassVar[int]
    TILE_DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    ready: Ready
    operation_done: OperationDone
    tile_done: TileDone
    failed: Failed
    pong: Pong
    def __init__(self, ready: _Optional[_Union[Ready, _Mapping]] = ..., operation_done: _Optional[_Union[OperationDone, _Mapping]] = ..., tile_done: _Optional[_Union[TileDone, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ...) -> None: ...

class Configure(_message.Message):
    __slots__ = ("device", "implementation", "device_budget_bytes", "cpu_threads", "issue_ahead_us", "log_level")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    IMPLEMENTATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_THREADS_FIELD_NUMBER: _ClassVar[int]
    ISSUE_AHEAD_US_FIELD_NUMBER: _ClassVar[int]
    LOG_LEVEL_FIELD_NUMBER: _ClassVar[int]
    device: str
    implementation: str
    device_budget_bytes: int
    cpu_threads: int
    issue_ahead_us: int
    log_level: str
    def __init__(self, device: _Optional[str] = ..., implementation: _Optional[str] = ..., device_budget_bytes: _Optional[int] = ..., cpu_threads: _Optional[int] = ..., issue_ahead_us: _Optional[int] = ..., log_level: _Optional[str] = ...) -> None: ...

class MapSegment(_message.Message):
    __slots__ = ("segment_id", "segment_bytes", "writable", "operation_id")
    SEGMENT_ID_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    segment_id: int
    segment_bytes: int
    writable: bool
    operation_id: int
    def __init__(self, segment_id: _Optional[int] = ..., segment_bytes: _Optional[int] = ..., writable: bool = ..., operation_id: _Optional[int] = ...) -> None: ...

class UnmapSegment(_message.Message):
    __slots__ = ("segment_id",)
    SEGMENT_ID_FIELD_NUMBER: _ClassVar[int]
    segment_id: int
    def __init__(self, segment_id: _Optional[int] = ...) -> None: ...

class AllocateExtent(_message.Message):
    __slots__ = ("operation_id", "extent_id", "extent_bytes")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    EXTENT_ID_FIELD_NUMBER: _ClassVar[int]
    EXTENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    operation_id: int
    extent_id: int
    extent_bytes: int
    def __init__(self, operation_id: _Optional[int] = ..., extent_id: _Optional[int] = ..., extent_bytes: _Optional[int] = ...) -> None: ...

class FreeExtent(_message.Message):
    __slots__ = ("extent_id",)
    EXTENT_ID_FIELD_NUMBER: _ClassVar[int]
    extent_id: int
    def __init__(self, extent_id: _Optional[int] = ...) -> None: ...

class LoadPages(_message.Message):
    __slots__ = ("operation_id", "page_bytes", "segment_ids", "segment_offsets", "extent_ids", "extent_offsets")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_IDS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    EXTENT_IDS_FIELD_NUMBER: _ClassVar[int]
    EXTENT_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    operation_id: int
    page_bytes: int
    segment_ids: _containers.RepeatedScalarFieldContainer[int]
    segment_offsets: _containers.RepeatedScalarFieldContainer[int]
    extent_ids: _containers.RepeatedScalarFieldContainer[int]
    extent_offsets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, operation_id: _Optional[int] = ..., page_bytes: _Optional[int] = ..., segment_ids: _Optional[_Iterable[int]] = ..., segment_offsets: _Optional[_Iterable[int]] = ..., extent_ids: _Optional[_Iterable[int]] = ..., extent_offsets: _Optional[_Iterable[int]] = ...) -> None: ...

class DefineViews(_message.Message):
    __slots__ = ("operation_id", "views")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    operation_id: int
    views: _containers.RepeatedCompositeFieldContainer[DefineView]
    def __init__(self, operation_id: _Optional[int] = ..., views: _Optional[_Iterable[_Union[DefineView, _Mapping]]] = ...) -> None: ...

class DefineView(_message.Message):
    __slots__ = ("view_id", "key_format", "head_dim", "length_keys", "extent_ids", "extent_offsets", "complete", "kv_format")
    VIEW_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FORMAT_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    LENGTH_KEYS_FIELD_NUMBER: _ClassVar[int]
    EXTENT_IDS_FIELD_NUMBER: _ClassVar[int]
    EXTENT_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    KV_FORMAT_FIELD_NUMBER: _ClassVar[int]
    view_id: int
    key_format: int
    head_dim: int
    length_keys: int
    extent_ids: _containers.RepeatedScalarFieldContainer[int]
    extent_offsets: _containers.RepeatedScalarFieldContainer[int]
    complete: bool
    kv_format: int
    def __init__(self, view_id: _Optional[int] = ..., key_format: _Optional[int] = ..., head_dim: _Optional[int] = ..., length_keys: _Optional[int] = ..., extent_ids: _Optional[_Iterable[int]] = ..., extent_offsets: _Optional[_Iterable[int]] = ..., complete: bool = ..., kv_format: _Optional[int] = ...) -> None: ...

class DropViews(_message.Message):
    __slots__ = ("view_ids",)
    VIEW_IDS_FIELD_NUMBER: _ClassVar[int]
    view_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, view_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("segment_id", "offset_bytes")
    SEGMENT_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    segment_id: int
    offset_bytes: int
    def __init__(self, segment_id: _Optional[int] = ..., offset_bytes: _Optional[int] = ...) -> None: ...

class SearchSequence(_message.Message):
    __slots__ = ("view_id", "rows")
    VIEW_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    view_id: int
    rows: int
    def __init__(self, view_id: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class SearchTile(_message.Message):
    __slots__ = ("tile_id", "sequences", "rows", "heads", "ratio", "top_k", "order", "workspace_bytes", "q", "w", "positions", "indices", "scores", "first_key", "merge", "band", "estimated_us", "request_id", "traceparent")
    TILE_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    RATIO_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    WORKSPACE_BYTES_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    W_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    FIRST_KEY_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    BAND_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_US_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    tile_id: int
    sequences: _containers.RepeatedCompositeFieldContainer[SearchSequence]
    rows: int
    heads: int
    ratio: int
    top_k: int
    order: int
    workspace_bytes: int
    q: Span
    w: Span
    positions: Span
    indices: Span
    scores: Span
    first_key: int
    merge: bool
    band: int
    estimated_us: int
    request_id: str
    traceparent: str
    def __init__(self, tile_id: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[SearchSequence, _Mapping]]] = ..., rows: _Optional[int] = ..., heads: _Optional[int] = ..., ratio: _Optional[int] = ..., top_k: _Optional[int] = ..., order: _Optional[int] = ..., workspace_bytes: _Optional[int] = ..., q: _Optional[_Union[Span, _Mapping]] = ..., w: _Optional[_Union[Span, _Mapping]] = ..., positions: _Optional[_Union[Span, _Mapping]] = ..., indices: _Optional[_Union[Span, _Mapping]] = ..., scores: _Optional[_Union[Span, _Mapping]] = ..., first_key: _Optional[int] = ..., merge: bool = ..., band: _Optional[int] = ..., estimated_us: _Optional[int] = ..., request_id: _Optional[str] = ..., traceparent: _Optional[str] = ...) -> None: ...

class AttendSequence(_message.Message):
    __slots__ = ("view_id", "window_view_id", "first_window_row", "rows")
    VIEW_ID_FIELD_NUMBER: _ClassVar[int]
    WINDOW_VIEW_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_WINDOW_ROW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    view_id: int
    window_view_id: int
    first_window_row: int
    rows: int
    def __init__(self, view_id: _Optional[int] = ..., window_view_id: _Optional[int] = ..., first_window_row: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class AttendTile(_message.Message):
    __slots__ = ("tile_id", "sequences", "window", "rows", "heads", "width", "value_dim", "scale", "sink", "workspace_bytes", "q", "positions", "indices", "visible_ratio", "parts", "out", "lse", "band", "estimated_us", "request_id", "traceparent")
    TILE_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    VALUE_DIM_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SINK_FIELD_NUMBER: _ClassVar[int]
    WORKSPACE_BYTES_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    VISIBLE_RATIO_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    OUT_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    BAND_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_US_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    tile_id: int
    sequences: _containers.RepeatedCompositeFieldContainer[AttendSequence]
    window: int
    rows: int
    heads: int
    width: int
    value_dim: int
    scale: float
    sink: _containers.RepeatedScalarFieldContainer[float]
    workspace_bytes: int
    q: Span
    positions: Span
    indices: Span
    visible_ratio: int
    parts: int
    out: Span
    lse: Span
    band: int
    estimated_us: int
    request_id: str
    traceparent: str
    def __init__(self, tile_id: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[AttendSequence, _Mapping]]] = ..., window: _Optional[int] = ..., rows: _Optional[int] = ..., heads: _Optional[int] = ..., width: _Optional[int] = ..., value_dim: _Optional[int] = ..., scale: _Optional[float] = ..., sink: _Optional[_Iterable[float]] = ..., workspace_bytes: _Optional[int] = ..., q: _Optional[_Union[Span, _Mapping]] = ..., positions: _Optional[_Union[Span, _Mapping]] = ..., indices: _Optional[_Union[Span, _Mapping]] = ..., visible_ratio: _Optional[int] = ..., parts: _Optional[int] = ..., out: _Optional[_Union[Span, _Mapping]] = ..., lse: _Optional[_Union[Span, _Mapping]] = ..., band: _Optional[int] = ..., estimated_us: _Optional[int] = ..., request_id: _Optional[str] = ..., traceparent: _Optional[str] = ...) -> None: ...

class CancelTiles(_message.Message):
    __slots__ = ("tile_ids",)
    TILE_IDS_FIELD_NUMBER: _ClassVar[int]
    tile_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tile_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class Shutdown(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Ready(_message.Message):
    __slots__ = ("device_name", "device_type", "device_bytes", "implementation", "implementations", "device_budget_bytes", "workspace", "attention")
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IMPLEMENTATION_FIELD_NUMBER: _ClassVar[int]
    IMPLEMENTATIONS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    WORKSPACE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    device_name: str
    device_type: str
    device_bytes: int
    implementation: str
    implementations: _containers.RepeatedCompositeFieldContainer[ImplementationSupport]
    device_budget_bytes: int
    workspace: WorkspaceTerms
    attention: AttentionSupport
    def __init__(self, device_name: _Optional[str] = ..., device_type: _Optional[str] = ..., device_bytes: _Optional[int] = ..., implementation: _Optional[str] = ..., implementations: _Optional[_Iterable[_Union[ImplementationSupport, _Mapping]]] = ..., device_budget_bytes: _Optional[int] = ..., workspace: _Optional[_Union[WorkspaceTerms, _Mapping]] = ..., attention: _Optional[_Union[AttentionSupport, _Mapping]] = ...) -> None: ...

class AttentionSupport(_message.Message):
    __slots__ = ("implementation", "kv_formats", "terms")
    IMPLEMENTATION_FIELD_NUMBER: _ClassVar[int]
    KV_FORMATS_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    implementation: str
    kv_formats: _containers.RepeatedScalarFieldContainer[int]
    terms: AttentionTerms
    def __init__(self, implementation: _Optional[str] = ..., kv_formats: _Optional[_Iterable[int]] = ..., terms: _Optional[_Union[AttentionTerms, _Mapping]] = ...) -> None: ...

class AttentionTerms(_message.Message):
    __slots__ = ("least_bytes", "fixed_bytes", "head_bytes", "head_dim_bytes", "entry_bytes", "entry_head_bytes", "entry_dim_bytes", "splits", "copied_row_bytes", "index_entry_bytes", "reads_pages")
    LEAST_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIXED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENTRY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENTRY_HEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENTRY_DIM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPLITS_FIELD_NUMBER: _ClassVar[int]
    COPIED_ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    INDEX_ENTRY_BYTES_FIELD_NUMBER: _ClassVar[int]
    READS_PAGES_FIELD_NUMBER: _ClassVar[int]
    least_bytes: int
    fixed_bytes: int
    head_bytes: int
    head_dim_bytes: int
    entry_bytes: int
    entry_head_bytes: int
    entry_dim_bytes: int
    splits: bool
    copied_row_bytes: int
    index_entry_bytes: int
    reads_pages: bool
    def __init__(self, least_bytes: _Optional[int] = ..., fixed_bytes: _Optional[int] = ..., head_bytes: _Optional[int] = ..., head_dim_bytes: _Optional[int] = ..., entry_bytes: _Optional[int] = ..., entry_head_bytes: _Optional[int] = ..., entry_dim_bytes: _Optional[int] = ..., splits: bool = ..., copied_row_bytes: _Optional[int] = ..., index_entry_bytes: _Optional[int] = ..., reads_pages: bool = ...) -> None: ...

class WorkspaceTerms(_message.Message):
    __slots__ = ("fixed_bytes", "row_bytes", "row_element_bytes", "row_entry_bytes", "row_key_32nds", "row_key_head_bytes", "key_bytes", "key_dim_bytes", "filter_keys", "filter_entries", "survivor_bytes", "survivors", "entry_survivors", "marked_row_bytes", "marked_key_32nds")
    FIXED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROW_ELEMENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROW_ENTRY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROW_KEY_32NDS_FIELD_NUMBER: _ClassVar[int]
    ROW_KEY_HEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEY_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEY_DIM_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILTER_KEYS_FIELD_NUMBER: _ClassVar[int]
    FILTER_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    SURVIVOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    ENTRY_SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    MARKED_ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    MARKED_KEY_32NDS_FIELD_NUMBER: _ClassVar[int]
    fixed_bytes: int
    row_bytes: int
    row_element_bytes: int
    row_entry_bytes: int
    row_key_32nds: int
    row_key_head_bytes: int
    key_bytes: int
    key_dim_bytes: int
    filter_keys: int
    filter_entries: int
    survivor_bytes: int
    survivors: int
    entry_survivors: int
    marked_row_bytes: int
    marked_key_32nds: int
    def __init__(self, fixed_bytes: _Optional[int] = ..., row_bytes: _Optional[int] = ..., row_element_bytes: _Optional[int] = ..., row_entry_bytes: _Optional[int] = ..., row_key_32nds: _Optional[int] = ..., row_key_head_bytes: _Optional[int] = ..., key_bytes: _Optional[int] = ..., key_dim_bytes: _Optional[int] = ..., filter_keys: _Optional[int] = ..., filter_entries: _Optional[int] = ..., survivor_bytes: _Optional[int] = ..., survivors: _Optional[int] = ..., entry_survivors: _Optional[int] = ..., marked_row_bytes: _Optional[int] = ..., marked_key_32nds: _Optional[int] = ...) -> None: ...

class ImplementationSupport(_message.Message):
    __slots__ = ("name", "key_formats", "repeatable")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KEY_FORMATS_FIELD_NUMBER: _ClassVar[int]
    REPEATABLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    key_formats: _containers.RepeatedScalarFieldContainer[int]
    repeatable: bool
    def __init__(self, name: _Optional[str] = ..., key_formats: _Optional[_Iterable[int]] = ..., repeatable: bool = ...) -> None: ...

class OperationDone(_message.Message):
    __slots__ = ("operation_id",)
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: int
    def __init__(self, operation_id: _Optional[int] = ...) -> None: ...

class TileDone(_message.Message):
    __slots__ = ("tile_id", "device_us", "peak_bytes", "issued_us", "ended_us")
    TILE_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_US_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    ISSUED_US_FIELD_NUMBER: _ClassVar[int]
    ENDED_US_FIELD_NUMBER: _ClassVar[int]
    tile_id: int
    device_us: int
    peak_bytes: int
    issued_us: int
    ended_us: int
    def __init__(self, tile_id: _Optional[int] = ..., device_us: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., issued_us: _Optional[int] = ..., ended_us: _Optional[int] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("id", "kind", "detail")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    id: int
    kind: FailureKind
    detail: str
    def __init__(self, id: _Optional[int] = ..., kind: _Optional[_Union[FailureKind, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("sequence", "oldest_running_ms", "allocated_bytes", "peak_bytes", "reserved_bytes", "compiled_kernels")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    OLDEST_RUNNING_MS_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPILED_KERNELS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    oldest_running_ms: int
    allocated_bytes: int
    peak_bytes: int
    reserved_bytes: int
    compiled_kernels: int
    def __init__(self, sequence: _Optional[int] = ..., oldest_running_ms: _Optional[int] = ..., allocated_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., compiled_kernels: _Optional[int] = ...) -> None: ...
