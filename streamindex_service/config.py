"""The settings: one frozen tree. Flags win over the environment, that over the file, that over the defaults.

Environment variables are `STREAMINDEX_` and the path, joined by two underscores, such as
`STREAMINDEX_MEMORY__HOST_BUDGET_BYTES`.
The file is TOML with one table a section. `docs/configuration.md` lists every setting.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.5, le=1.0)]
_MIB = 1 << 20
_FRAMING_BYTES = 65_536  # of a message, beyond its payload


def is_loopback(host: str) -> bool:
    """Whether an address, without brackets, is this host's own; a name other than localhost never is."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(_Section):
    """Where the service listens, and what it bears."""

    tcp_address: str = Field(
        "127.0.0.1:50051", description='host:port; port 0 takes a free one; "" listens on no TCP port'
    )
    unix_socket: str = Field(
        "", description='path of a unix socket (mode 0600, or 0666 with auth.unix_uids); "" for none'
    )
    drain_s: Seconds = Field(25.0, description="after SIGTERM, running calls may go on for so long")
    reflection: bool = Field(True, description="gRPC reflection, for callers that may call")
    max_connections: Count = Field(1024, description="connections of the TCP address, and of the unix socket")
    max_streams_per_connection: Count = Field(
        256, description="concurrent calls of one connection, with those that have ended a moment ago"
    )
    max_caches: Count = Field(100_000, description="key caches, all callers together")
    max_uploads: Count = Field(4096, description="open uploads, all callers together")
    max_watchers: Count = Field(64, description="callers that watch the load at a time")
    max_health_watchers: Count = Field(1024, description="calls that watch the health at a time")
    upload_ttl_s: Seconds = Field(600.0, description="an upload that nobody writes is forgotten after so long")
    default_idle_ttl_s: Seconds = Field(3600.0, description="a cache that nobody names is dropped after so long")
    max_idle_ttl_s: Seconds = Field(86_400.0, description="the longest idle time to live that a cache may ask for")
    sweep_s: Seconds = Field(5.0, description="how often expired caches and uploads are looked for")
    keepalive_s: Seconds = Field(30.0, description="a silent connection is asked for a sign of life after so long")

    @field_validator("tcp_address")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        if not value:
            return value
        host, separator, port = value.rpartition(":")
        if not separator or not host or not port.isdigit() or int(port) > 65535:
            raise ValueError("must be host:port")
        return value

    @property
    def is_remote(self) -> bool:
        """Whether other hosts can reach the TCP address."""
        host = self.tcp_address.rpartition(":")[0].strip("[]")
        return bool(host) and not is_loopback(host)


class TlsSettings(_Section):
    """TLS on the TCP address. Files are PEM; replaced files hold from the next handshake on."""

    certificate_file: str = Field("", description='certificate chain of the service; "" for no TLS')
    key_file: str = Field("", description="its private key, without a passphrase")
    client_ca_file: str = Field(
        "", description='a client must have a certificate of one of these authorities; "" asks for none'
    )

    @model_validator(mode="after")
    def _complete(self) -> TlsSettings:
        if bool(self.certificate_file) != bool(self.key_file):
            raise ValueError("tls.certificate_file and tls.key_file go together")
        if self.client_ca_file and not self.certificate_file:
            raise ValueError("tls.client_ca_file needs tls.certificate_file")
        return self


class AuthSettings(_Section):
    """Who may call, and as whom. Without any of it, and without tls.client_ca_file, all callers are one."""

    unix_uids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (),
        description="users that may call on the unix socket, each a caller of its own; () for the service's alone",
    )
    token_file: str = Field(
        "", description='names and hashes of bearer tokens, as `streamindex token new` prints them; "" for none'
    )


class LimitSettings(_Section):
    """What a request may ask for."""

    max_caller_caches: Annotated[int, Field(ge=0)] = Field(0, description="key caches of one caller; 0: no quota")
    max_caller_host_bytes: ByteSize = Field(
        ByteSize(0), description="keys of one caller in host memory, shared ones once; 0: no quota"
    )
    max_caller_uploads: Annotated[int, Field(ge=0)] = Field(0, description="open uploads of one caller; 0: no quota")
    max_layers: Count = Field(256, description="layers of a cache")
    max_layer_keys: Annotated[int, Field(ge=256, le=2**31 - 1)] = Field(16_777_216, description="keys of a layer")
    max_top_k: Annotated[int, Field(ge=1, le=4096)] = Field(4096, description="indices of an answer row")
    max_given_indices: Annotated[int, Field(ge=1, le=262_144)] = Field(
        16_384, description="indices that a caller of attention gives, KV rows of a layer attended whole"
    )
    max_chunk_bytes: Annotated[ByteSize, Field(ge=262_144, le=64 * _MIB)] = Field(
        ByteSize(4 * _MIB), description="payload of one chunk"
    )
    upload_window_bytes: Annotated[ByteSize, Field(ge=262_144)] = Field(
        ByteSize(16 * _MIB), description="bytes of an upload that may be on their way"
    )
    max_message_bytes: Annotated[ByteSize, Field(ge=_MIB, le=1024 * _MIB)] = Field(
        ByteSize(64 * _MIB), description="one message of any call; a SearchBatch, a SparseAttendBatch is one message"
    )
    max_batch_items: Count = Field(1024, description="items of a SearchBatch or a SparseAttendBatch")
    max_batch_rows: Count = Field(
        4096, description="query rows of a SearchBatch or a SparseAttendBatch; rows that an item appends"
    )
    max_open_searches: Count = Field(4096, description="searches between header and end; one more gets QUEUE_FULL")
    slow_consumer_s: Seconds = Field(30.0, description="a stream whose caller does not read or send for so long ends")


class MemorySettings(_Section):
    """The three budgets."""

    device_budget_bytes: ByteSize = Field(
        ByteSize(0), description="pages and workspaces on the device; 0: 85 % of a GPU, 20 % of a CPU's memory"
    )
    host_budget_bytes: ByteSize = Field(ByteSize(0), description="keys in host memory; 0: half of the memory")
    host_high_watermark: Share = Field(
        0.95, description="part of the host budget above which no new upload begins; 1: none"
    )
    host_critical_watermark: Share = Field(
        0.98,
        description="part of the host budget above which no upload takes more memory and no cache is made; 1: none",
    )
    spill_dir: str = Field(
        "", description='directory on a local disk to which idle caches go when host memory is short; "" for none'
    )
    spill_bytes: ByteSize = Field(ByteSize(64 * 1024 * _MIB), description="keys that may be there")
    spill_watermark: Share = Field(
        0.9, description="part of the host budget above which caches idle for so long go to disk ahead of need"
    )
    spill_idle_s: Seconds = Field(30.0, description="so long")
    spill_pause_s: Seconds = Field(10.0, description="after a write that failed, none is tried for so long")
    spare_bytes: ByteSize = Field(
        ByteSize(512 * _MIB),
        description="freed memory of the host budget that is kept for the next keys, as long as nothing else needs it",
    )
    spare_segments: Count = Field(
        64, description="segments that it may consist of; each is two descriptors of the frontend, and of the worker"
    )
    spare_s: Seconds = Field(60.0, description="what of it nobody has taken for so long goes back to the system")
    ingress_budget_bytes: Annotated[ByteSize, Field(ge=4 * _MIB)] = Field(
        ByteSize(512 * _MIB), description="query rows received and not yet answered, and their answers"
    )
    extent_bytes: Annotated[ByteSize, Field(ge=65_536)] = Field(
        ByteSize(32 * _MIB), description="step in which host and device memory are taken for pages"
    )
    search_block_bytes: Annotated[ByteSize, Field(ge=262_144, le=64 * _MIB)] = Field(
        ByteSize(4 * _MIB), description="unit of a search's ingress memory; it also bounds a tile"
    )
    ingest_threads: Annotated[int, Field(ge=1, le=64)] = Field(8, description="threads that check and copy chunks")
    search_blocks: Annotated[int, Field(ge=2)] = Field(2, description="blocks that one search may hold")
    workspace_bytes: Annotated[ByteSize, Field(ge=16 * _MIB)] = Field(
        ByteSize(256 * _MIB), description="device workspace that a search takes when it is free"
    )
    workspace_floor_bytes: Annotated[ByteSize, Field(ge=16 * _MIB)] = Field(
        ByteSize(16 * _MIB), description="device workspace that a search waits for"
    )


class SchedulerSettings(_Section):
    """Who gets the device next."""

    max_queued_tiles: Count = Field(1024, description="tiles that wait; a search beyond gets QUEUE_FULL")
    max_queued_bytes: Annotated[ByteSize, Field(ge=_MIB)] = Field(
        ByteSize(384 * _MIB), description="query rows that wait; a search beyond gets QUEUE_FULL"
    )
    max_queued_s: Seconds = Field(30.0, description="device seconds that wait; a search beyond gets QUEUE_FULL")
    max_wait_s: Seconds = Field(60.0, description="a tile that has waited so long ends its search, with QUEUE_FULL")
    max_device_tiles: Annotated[int, Field(ge=2)] = Field(
        16, description="tiles of a priority band, and of those above it, that the device has while they are short"
    )
    device_ahead_s: Seconds = Field(
        0.005, description="device seconds of such tiles; beyond, it has two: one that runs, one that is ready"
    )
    short_tile_s: Seconds = Field(
        0.003, description="tiles are cut to about so long while a higher priority band is active"
    )
    paced_bytes_per_s: Annotated[ByteSize, Field(ge=_MIB)] = Field(
        ByteSize(384 * _MIB), description="what streams may bring in a second while decode steps are being answered"
    )
    active_s: Seconds = Field(1.0, description="a priority band is active for so long after each of its tiles")
    ageing_s: Seconds = Field(2.0, description="a priority band that has waited so long is given tiles in between")
    ageing_tiles: Annotated[int, Field(ge=2)] = Field(4, description="such a band gets one tile in so many")
    fair_quantum_s: Seconds = Field(
        0.5, description="device seconds that a caller with work waiting may fall behind its equal share"
    )
    promotion_factor: Annotated[float, Field(ge=1)] = Field(
        16.0,
        description="a layer that has made others go is followed by the next of its band after so many times the "
        "seconds of its copy",
    )
    promotion_wait_s: Seconds = Field(5.0, description="and in any case after so long")
    linger_s: Annotated[float, Field(ge=0)] = Field(
        0.3, description="a layer that no search is open for stays so long for the next one, while the device is busy"
    )


class WorkerSettings(_Section):
    """The device process."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda:\d+)$")] = Field("auto", description="auto, cpu or cuda:N")
    implementation: str = Field("", description='top-k implementation by name; "" takes the device\'s default')
    cpu_threads: Annotated[int, Field(ge=0)] = Field(0, description="threads of a CPU device; 0: all cores")
    tile_s: Seconds = Field(0.1, description="searches are cut in tiles of about so long, by the speed seen so far")
    issue_ahead_s: Annotated[float, Field(ge=0)] = Field(
        0.001, description="a GPU is given its next tile so long before it is done with those that it has"
    )
    memory_retries: Count = Field(
        3, description="tries of a tile for which the device had no memory: alone, then in ever smaller tiles"
    )
    ready_timeout_s: Seconds = Field(180.0, description="a worker that is not ready by then is replaced")
    heartbeat_s: Seconds = Field(1.0, description="how often the worker is asked for a sign of life")
    heartbeat_timeout_s: Seconds = Field(10.0, description="a worker that is silent for so long is replaced")
    work_timeout_s: Seconds = Field(120.0, description="a worker whose oldest work runs longer is replaced")
    restart_backoff_s: Seconds = Field(0.5, description="wait after a worker that did not start; doubles each time")
    max_restart_backoff_s: Seconds = Field(30.0, description="longest such wait")
    poison_deaths: Count = Field(2, description="workers that one request may kill before it is refused")


class LogSettings(_Section):
    """What is logged."""

    level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = Field(
        "info", description="least severe shown"
    )
    max_lines_per_s: Count = Field(
        100, description="lines of one event in a second; what is left out is counted in the next"
    )


class MetricsSettings(_Section):
    """Figures over HTTP: /metrics for Prometheus, a status page, health."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: Annotated[int, Field(ge=0, le=65_535)] = Field(9464, description="port; 0: none of this is served")
    allow_remote: bool = Field(
        False, description="allow a host that is not loopback: whoever reaches the port reads figures, and no names"
    )
    max_connections: Count = Field(16, description="connections at a time; one more is closed")
    timeout_s: Seconds = Field(10.0, description="a request and its answer may take so long")

    @model_validator(mode="after")
    def _only_loopback(self) -> MetricsSettings:
        if not (self.allow_remote or is_loopback(self.host)):
            raise ValueError(
                "metrics.host: there is no authentication on this port, so an address that is not loopback must be "
                "allowed by metrics.allow_remote"
            )
        return self


class TraceSettings(_Section):
    """Spans for an OpenTelemetry collector; needs the extra `otel`. Headers and certificates for it, and the service's
    name, are taken from OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_CERTIFICATE and OTEL_SERVICE_NAME."""

    otlp_endpoint: Annotated[str, Field(pattern=r"^(https?://[^\s/@]+:\d+)?$")] = Field(
        "", description='collector that takes OTLP over gRPC, as http://127.0.0.1:4317; "" for no traces'
    )
    sample_share: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description="part of the calls that are traced, of those whose callers do not say",
    )
    max_tiles: Count = Field(32, description="tiles of a call with spans of their own; later ones are told in groups")
    max_queued_spans: Count = Field(4096, description="spans that wait for the collector; one more drops the oldest")
    export_timeout_s: Seconds = Field(5.0, description="the collector may take so long for what it is sent")
    flush_s: Seconds = Field(2.0, description="at the end, spans that are left have so long to go")


class Settings(BaseSettings):
    """All settings."""

    model_config = SettingsConfigDict(
        env_prefix="STREAMINDEX_", env_nested_delimiter="__", frozen=True, extra="forbid", validate_default=True
    )

    server: ServerSettings = ServerSettings()
    tls: TlsSettings = TlsSettings()
    auth: AuthSettings = AuthSettings()
    limits: LimitSettings = LimitSettings()
    memory: MemorySettings = MemorySettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    worker: WorkerSettings = WorkerSettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()
    traces: TraceSettings = TraceSettings()

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        if self.auth.unix_uids and not self.server.unix_socket:
            raise ValueError("auth.unix_uids needs server.unix_socket")
        knows_callers = self.auth.token_file or self.tls.client_ca_file
        if self.server.is_remote and not (self.tls.certificate_file and knows_callers):
            raise ValueError(
                "server.tcp_address is not a loopback address: that needs TLS (tls.certificate_file, tls.key_file) and "
                "authentication (auth.token_file or tls.client_ca_file)"
            )
        limits, memory = self.limits, self.memory
        largest = max(limits.max_chunk_bytes, memory.search_block_bytes)
        if memory.ingress_budget_bytes < largest:
            raise ValueError(
                f"memory.ingress_budget_bytes must be at least {largest}: one chunk (limits.max_chunk_bytes) and one "
                "block (memory.search_block_bytes) must fit"
            )
        if limits.max_message_bytes < limits.max_chunk_bytes + _FRAMING_BYTES:
            raise ValueError(f"limits.max_message_bytes must exceed limits.max_chunk_bytes by {_FRAMING_BYTES}")
        if memory.workspace_bytes < memory.workspace_floor_bytes:
            raise ValueError("memory.workspace_bytes must be at least memory.workspace_floor_bytes")
        if memory.host_critical_watermark < memory.host_high_watermark:
            raise ValueError("memory.host_critical_watermark must be at least memory.host_high_watermark")
        if self.scheduler.fair_quantum_s < 3 * self.worker.tile_s:
            raise ValueError("scheduler.fair_quantum_s must be at least three times worker.tile_s")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, file; nothing else is read."""
        file = TomlConfigSettingsSource(settings_cls, settings_cls.model_config.get("toml_file"))
        return init_settings, env_settings, file


def load(file: Path | None = None, **flags: Any) -> Settings:
    """Read the settings. `flags` are sections as dictionaries. Raises pydantic.ValidationError, OSError."""
    if file is None:
        return Settings(**flags)
    file.open("rb").close()  # a file that was named must be there
    bound = type(
        "Settings", (Settings,), {"model_config": SettingsConfigDict(**{**Settings.model_config, "toml_file": file})}
    )
    settings: Settings = bound(**flags)
    return settings
