"""What the service tells about itself and its caches, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from streamindex.v1 import key_cache_pb2

from streamindex_client.errors import ProtocolError
from streamindex_client.formats import KeyFormat, KvFormat, Priority, RowKind, member
from streamindex_client.tensors import unsigned

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamindex.v1 import server_pb2

__all__ = [
    "CacheResidency",
    "Capabilities",
    "Implementation",
    "KeyCacheInfo",
    "KeyCacheSpec",
    "KvSpec",
    "Ledger",
    "Load",
    "UploadState",
]


@dataclass(frozen=True, slots=True)
class KvSpec:
    """KV rows and window rows of a cache: `key_dim` elements of a key, of which the first `value_dim` are the value,
    shared by `heads` query heads of attention."""

    kv_format: KvFormat | str
    key_dim: int
    value_dim: int
    heads: int

    def to_wire(self) -> key_cache_pb2.KvSpec:
        """As a message. Raises InputError naming an argument that is no number of its kind or no valid name."""
        return key_cache_pb2.KvSpec(
            kv_format=self.format.wire,
            key_dim=unsigned("kv.key_dim", self.key_dim, 32, 1),
            value_dim=unsigned("kv.value_dim", self.value_dim, 32, 1),
            heads=unsigned("kv.heads", self.heads, 32, 1),
        )

    @property
    def format(self) -> KvFormat:
        """The format, by whatever it was named. Raises InputError."""
        return member(KvFormat, "kv.kv_format", self.kv_format)

    @classmethod
    def from_wire(cls, spec: key_cache_pb2.KvSpec) -> KvSpec:
        """From a message. Raises ProtocolError for a format that this version does not know."""
        kv_format = KvFormat.from_wire(spec.kv_format)
        if kv_format is None:
            raise ProtocolError(f"the cache has KV format {spec.kv_format}, which this version does not know")
        return cls(kv_format, spec.key_dim, spec.value_dim, spec.heads)


@dataclass(frozen=True, slots=True)
class KeyCacheSpec:
    """What a cache is; fixed for its life.

    `heads` of the queries, `head_dim` elements of a key, `ratio` tokens a key, `expected_keys` a layer (0: unknown),
    `idle_ttl_s` (0: the server's default), `kv` None where it holds index keys alone. Limits are the server's: see
    `Capabilities.limits`.
    """

    heads: int
    head_dim: int
    ratio: int
    key_format: KeyFormat
    layers: int
    convention: str = ""
    expected_keys: int = 0
    idle_ttl_s: int = 0
    priority: Priority = Priority.STANDARD
    kv: KvSpec | None = None

    def to_wire(self) -> key_cache_pb2.KeyCacheSpec:
        """As a message. Raises InputError naming an argument that is no number of its kind or no valid name."""
        return key_cache_pb2.KeyCacheSpec(
            heads=unsigned("heads", self.heads, 32, 1),
            head_dim=unsigned("head_dim", self.head_dim, 32, 1),
            ratio=unsigned("ratio", self.ratio, 32, 1),
            key_format=member(KeyFormat, "key_format", self.key_format).wire,
            layers=unsigned("layers", self.layers, 32, 1),
            convention=self.convention,
            expected_keys=unsigned("expected_keys", self.expected_keys, 64),
            idle_ttl_s=unsigned("idle_ttl_s", self.idle_ttl_s, 32),
            priority=member(Priority, "priority", self.priority).wire,
            kv=None if self.kv is None else self.kv.to_wire(),
        )

    @classmethod
    def from_wire(cls, spec: key_cache_pb2.KeyCacheSpec) -> KeyCacheSpec:
        """From a message. Raises ProtocolError for a format that this version does not know."""
        key_format = KeyFormat.from_wire(spec.key_format)
        if key_format is None:
            raise ProtocolError(f"the cache has key format {spec.key_format}, which this version does not know")
        return cls(
            spec.heads,
            spec.head_dim,
            spec.ratio,
            key_format,
            spec.layers,
            spec.convention,
            spec.expected_keys,
            spec.idle_ttl_s,
            Priority.from_wire(spec.priority),
            KvSpec.from_wire(spec.kv) if spec.HasField("kv") else None,
        )


@dataclass(frozen=True, slots=True)
class KeyCacheInfo:
    """A cache's state when the server last told it. The last two are empty where it holds index keys alone."""

    id: str
    spec: KeyCacheSpec
    layer_keys: tuple[int, ...]
    host_bytes: int
    resident_bytes: int
    spilled_bytes: int = 0
    layer_kv_rows: tuple[int, ...] = ()
    layer_window_rows: tuple[int, ...] = ()

    def lengths(self, kind: RowKind) -> tuple[int, ...]:
        """Rows of one kind, layer by layer."""
        return {
            RowKind.KEYS: self.layer_keys,
            RowKind.KV: self.layer_kv_rows,
            RowKind.WINDOW: self.layer_window_rows,
        }[kind]

    def with_lengths(self, kind: RowKind, lengths: tuple[int, ...]) -> KeyCacheInfo:
        """The same with other lengths of one kind."""
        if kind is RowKind.KEYS:
            return replace(self, layer_keys=lengths)
        if kind is RowKind.KV:
            return replace(self, layer_kv_rows=lengths)
        return replace(self, layer_window_rows=lengths)

    @classmethod
    def from_wire(cls, cache: key_cache_pb2.KeyCache) -> KeyCacheInfo:
        """From a message. Raises ProtocolError."""
        spec = KeyCacheSpec.from_wire(cache.spec)
        lengths = (*cache.layer_keys, *(0 for _ in range(spec.layers - len(cache.layer_keys))))
        return cls(
            cache.id,
            spec,
            lengths,
            cache.host_bytes,
            cache.resident_bytes,
            cache.spilled_bytes,
            tuple(cache.layer_kv_rows),
            tuple(cache.layer_window_rows),
        )


@dataclass(frozen=True, slots=True)
class UploadState:
    """How far an upload has come: rows held, and whether they are visible."""

    row_offset: int
    committed: bool


@dataclass(frozen=True, slots=True)
class Implementation:
    """One implementation of the search; `repeatable`: bitwise the same answer however the work is cut."""

    name: str
    key_formats: tuple[KeyFormat, ...]
    repeatable: bool


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the server can do; constant while it runs. `limits` has the names of the contract's `Limits`."""

    service_version: str
    device: str
    implementation: str
    implementations: tuple[Implementation, ...]
    key_formats: tuple[KeyFormat, ...]
    limits: dict[str, int] = field(default_factory=dict)
    attention_implementation: str = ""
    kv_formats: tuple[KvFormat, ...] = ()

    @classmethod
    def from_wire(cls, answer: server_pb2.GetCapabilitiesResponse) -> Capabilities:
        """From a message; formats that this version does not know are left out."""
        return cls(
            answer.service_version,
            answer.device,
            answer.implementation,
            tuple(
                Implementation(each.name, _formats(each.key_formats), each.repeatable)
                for each in answer.implementations
            ),
            _formats(answer.key_formats),
            {name: getattr(answer.limits, name) for name in answer.limits.DESCRIPTOR.fields_by_name},
            answer.attention_implementation,
            tuple(known for number in answer.kv_formats if (known := KvFormat.from_wire(number)) is not None),
        )


@dataclass(frozen=True, slots=True)
class Ledger:
    """One budget of the server, in bytes. `spare_bytes`: freed memory kept for reuse, beside what is reserved."""

    limit_bytes: int
    reserved_bytes: int
    peak_bytes: int
    spare_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CacheResidency:
    """How many key caches with rows are on the device wholly (`device`), partly (`partial`), not at all (`none`); and
    how many of them have rows on disk (`spilled`)."""

    device: int = 0
    partial: int = 0
    none: int = 0
    spilled: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the server is. Allocator's bytes are 0 on a CPU.

    `ledgers` by name: hbm, host, ingress, spill if there is one.

    Tiles of searches wait for the device (`queued_tiles`, about `queued_us` of work), then are with it
    (`device_tiles`). `device_busy_us` is since the start. `device_reserved_bytes` is what the allocator has taken, in
    use or not; `memory_failures` are the times that a tile found no device memory. `residency` tells how many caches
    are on the device, and on disk.
    """

    ready: bool
    ledgers: dict[str, Ledger]
    queued_searches: int
    running_searches: int
    key_caches: int
    open_uploads: int
    worker_restarts: int
    device_allocated_bytes: int
    device_peak_bytes: int
    uptime_ms: int
    queued_tiles: int = 0
    queued_us: int = 0
    device_tiles: int = 0
    device_busy_us: int = 0
    resident_bytes: int = 0
    device_reserved_bytes: int = 0
    memory_failures: int = 0
    residency: CacheResidency = field(default_factory=CacheResidency)

    @classmethod
    def from_wire(cls, answer: server_pb2.GetLoadResponse) -> Load:
        """From a message."""
        return cls(
            answer.ready,
            {
                each.name: Ledger(each.limit_bytes, each.reserved_bytes, each.peak_bytes, each.spare_bytes)
                for each in answer.ledgers
            },
            answer.queued_searches,
            answer.running_searches,
            answer.key_caches,
            answer.open_uploads,
            answer.worker_restarts,
            answer.device_allocated_bytes,
            answer.device_peak_bytes,
            answer.uptime_ms,
            answer.queue.tiles,
            answer.queue.estimated_us,
            answer.device.tiles,
            answer.device.busy_us,
            answer.device.resident_bytes,
            answer.device_reserved_bytes,
            answer.device.memory.failures,
            CacheResidency(
                answer.residency.device, answer.residency.partial, answer.residency.none, answer.residency.spilled
            ),
        )


def _formats(numbers: Iterable[int]) -> tuple[KeyFormat, ...]:
    return tuple(known for number in numbers if (known := KeyFormat.from_wire(number)) is not None)
