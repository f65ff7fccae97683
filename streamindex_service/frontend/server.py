"""Puts the server together, listens, and stops in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from streamindex import framing
from streamindex.v1 import attention_pb2, key_cache_pb2, search_pb2, server_pb2

from streamindex_service.config import Settings
from streamindex_service.errors import DrainingError
from streamindex_service.frontend.allocator import keep_message_buffers
from streamindex_service.frontend.attention_servicer import AttentionServicer
from streamindex_service.frontend.collector import spare_what_stays
from streamindex_service.frontend.health import HealthServicer
from streamindex_service.frontend.identity import Identify, authenticator, current
from streamindex_service.frontend.interceptor import CallInterceptor
from streamindex_service.frontend.key_cache_servicer import KeyCacheServicer
from streamindex_service.frontend.metrics_server import MetricsServer
from streamindex_service.frontend.peer_socket import PeerSocket
from streamindex_service.frontend.rpc import generic_handler
from streamindex_service.frontend.search_servicer import SearchServicer
from streamindex_service.frontend.server_servicer import ServerServicer
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tls import TlsError, TlsFiles
from streamindex_service.frontend.tokens import TokenFile, TokenFileError
from streamindex_service.frontend.traces import ExtraMissingError, tracing_of
from streamindex_service.telemetry import logs
from streamindex_service.telemetry.spans import Tracing

_PIECE_BYTES = 1 << 20
_METADATA_BYTES = 16_384  # of a call's headers: a token, two ids
_UNCOMPRESSED_ONLY = 1  # a bit for each of gRPC's compression algorithms; the lowest is for none


@dataclass(frozen=True)
class Listening:
    """Where a server can be reached."""

    tcp_address: str | None
    unix_socket: str | None
    metrics: str | None = None


class ServeError(RuntimeError):
    """The server cannot run with these settings, for a reason that whoever started it can do something about."""


class SocketInUseError(ServeError):
    """Another server listens there."""


class UnusableDeviceError(ServeError):
    """The settings ask for a device or an implementation that is not here."""


class CredentialsError(ServeError):
    """A file of certificates, keys or tokens is not usable."""


class SpillDirectoryError(ServeError):
    """Keys cannot be spilled where the settings say."""


class TracesError(ServeError):
    """The settings ask for traces, and what makes them is not installed."""


class Server:
    """A service behind gRPC. `start`, then `stop`. `tracing` takes the place of what the settings ask for."""

    def __init__(self, settings: Settings, identify: Identify | None = None, tracing: Tracing | None = None) -> None:
        self.settings = settings
        self.service = Service(settings, logs.get("frontend"))
        self._log = self.service.log
        self._draining = False
        self.service.admit = self._admit
        services = [
            service
            for module in (key_cache_pb2, search_pb2, attention_pb2, server_pb2)
            for service in module.DESCRIPTOR.services_by_name.values()
        ]
        self._names = [service.full_name for service in services]
        for service in services:  # a series of the metrics is there before its first call
            for method in service.methods:
                self.service.counters.of(method.name)
        self._peers: PeerSocket | None = None
        authenticate = identify or _authenticator(settings, self._log, self._uid_of)
        self._tracing = tracing or _tracing(settings, self._log)
        self._calls = CallInterceptor(
            self._log, authenticate, self._admit, self.service.counters, services, self._tracing
        )
        self._health = HealthServicer(settings.server.max_health_watchers)
        self._server = self._make_server()
        self._metrics = MetricsServer(self.service, settings.metrics)

    async def start(self) -> Listening:
        """Listen, and start the worker; the health service says SERVING once that is ready.

        Raises SocketInUseError, SpillDirectoryError, CredentialsError.
        """
        try:
            self.service.room.check()
        except OSError as error:
            directory = self.settings.memory.spill_dir
            raise SpillDirectoryError(
                f"cannot make files in memory.spill_dir, {directory}: {error.strerror}"
            ) from error
        tcp_address = unix_socket = None
        wanted = self.settings.server
        if wanted.tcp_address:  # first: if this fails, there is no socket's file to remove
            host = wanted.tcp_address.rpartition(":")[0]
            port = self._listen_tcp(wanted.tcp_address)
            tcp_address = f"{host}:{port}"
        if wanted.unix_socket:
            self._listen_unix(wanted.unix_socket)
            unix_socket = wanted.unix_socket
        try:
            metrics = await self._metrics.start()
        except OSError as error:
            where = f"{self.settings.metrics.host}:{self.settings.metrics.port}"
            raise SocketInUseError(f"cannot listen on {where} (metrics.port): {error.strerror}") from error
        self._set_health(ready=False)
        self.service.health_changed = lambda ready: self._set_health(ready=ready)
        await self._server.start()
        if self._peers is not None:
            self._peers.start()
        self.service.start()
        self._log.info("listening", tcp=tcp_address, unix=unix_socket, metrics=metrics)
        return Listening(tcp_address, unix_socket, metrics)

    async def stop(self, drain_s: float) -> None:
        """Not ready, refuse what is new, let running calls go on for `drain_s`, cancel the rest, stop the worker."""
        self._draining = True
        self.service.draining.set()
        self._health.end()
        running = [task for task in self._calls.running if not task.done()]
        if running and drain_s > 0:
            await asyncio.wait(running, timeout=drain_s)
        left = sum(not task.done() for task in running)
        if left:
            self._log.warning("calls_cancelled", count=left)
        await self._server.stop(grace=0.2)
        if self._peers is not None:
            self._peers.stop()
        await self.service.stop()
        await self._metrics.stop()
        if self._tracing is not None:
            await self._tracing.stop()
        if self.settings.server.unix_socket:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.settings.server.unix_socket)
        self._log.info("stopped")

    def _admit(self) -> None:
        if self._draining:
            raise DrainingError("the server is shutting down")

    def _uid_of(self, peer: str) -> int | None:
        return None if self._peers is None else self._peers.uid_of(peer)

    def _set_health(self, *, ready: bool) -> None:
        self._health.set(("", *self._names), ready=ready)

    def _listen_tcp(self, address: str) -> int:
        """Listen, with TLS if the settings say so; the port."""
        tls = self.settings.tls
        try:
            if not tls.certificate_file:
                port: int = self._server.add_insecure_port(address)
            else:
                files = TlsFiles(tls.certificate_file, tls.key_file, tls.client_ca_file, self._log)
                port = self._server.add_secure_port(address, files.credentials())
        except TlsError as error:
            raise CredentialsError(str(error)) from error
        except RuntimeError as error:
            raise SocketInUseError(f"cannot listen on {address}") from error
        return port

    def _listen_unix(self, path: str) -> None:
        _remove_stale_socket(path)
        uids = self.settings.auth.unix_uids
        if uids:
            try:
                self._peers = PeerSocket(path, uids, self.settings.server.max_connections, self._log)
            except OSError as error:
                raise SocketInUseError(f"cannot listen on {path}: {error.strerror}") from error
            path = self._peers.upstream
        # The socket is made with this mask, so that there is no moment in which others could connect.
        mask = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise SocketInUseError(f"cannot listen on {path}") from error
        finally:
            os.umask(mask)

    def _make_server(self) -> Any:
        wanted = self.settings.server
        server = grpc.aio.server(
            interceptors=(self._calls,),
            options=(
                ("grpc.max_receive_message_length", int(self.settings.limits.max_message_bytes)),
                ("grpc.max_send_message_length", int(self.settings.limits.max_message_bytes)),
                ("grpc.max_concurrent_streams", wanted.max_streams_per_connection),
                ("grpc.max_allowed_incoming_connections", wanted.max_connections),
                ("grpc.max_metadata_size", _METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
                ("grpc.keepalive_time_ms", int(1000 * wanted.keepalive_s)),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.server_handshake_timeout_ms", 10_000),
                # gRPC unpacks a message before it looks at its length: a megabyte would become a gigabyte.
                ("grpc.compression_enabled_algorithms_bitset", _UNCOMPRESSED_ONLY),
                ("grpc.so_reuseport", 0),
                # Messages are large: fewer, larger pieces cost the event loop a quarter less to put together.
                ("grpc.http2.max_frame_size", _PIECE_BYTES),
                ("grpc.experimental.tcp_read_chunk_size", _PIECE_BYTES),
            ),
        )
        caches = KeyCacheServicer(self.service, current)
        searches = SearchServicer(self.service, current)
        attention = AttentionServicer(self.service, current)
        status = ServerServicer(self.service, current)
        handlers = (
            generic_handler(
                key_cache_pb2.DESCRIPTOR.services_by_name["KeyCacheService"],
                {
                    "CreateKeyCache": caches.create,
                    "GetKeyCache": caches.get,
                    "ListKeyCaches": caches.list,
                    "DeleteKeyCache": caches.delete,
                    "TruncateKeys": caches.truncate,
                    "ForkKeyCache": caches.fork,
                    "AppendKeys": caches.append,
                    "QueryUpload": caches.query_upload,
                },
                {"AppendKeys": framing.parse_append_keys_request},
            ),
            generic_handler(
                search_pb2.DESCRIPTOR.services_by_name["SearchService"],
                {"Search": searches.search, "SearchBatch": searches.search_batch},
                {"Search": framing.parse_search_request},
            ),
            generic_handler(
                attention_pb2.DESCRIPTOR.services_by_name["AttentionService"],
                {"SparseAttend": attention.sparse_attend, "SparseAttendBatch": attention.sparse_attend_batch},
                {"SparseAttend": framing.parse_attend_request},
            ),
            generic_handler(
                server_pb2.DESCRIPTOR.services_by_name["ServerService"],
                {
                    "GetCapabilities": status.get_capabilities,
                    "GetLoad": status.get_load,
                    "WatchLoad": status.watch_load,
                },
                {},
            ),
        )
        server.add_generic_rpc_handlers(handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if wanted.reflection:
            reflection.enable_server_reflection((*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server


async def serve(settings: Settings, on_listening: Callable[[Listening], None] | None = None) -> None:
    """Run a server until SIGTERM or SIGINT, then drain; a second signal stops at once.

    Raises SocketInUseError, CredentialsError, TracesError; UnusableDeviceError when no worker can ever be ready.
    """
    logs.configure(settings.log.level, settings.log.max_lines_per_s)
    keep_message_buffers()
    # Two descriptors an extent, here and in the worker, which inherits this.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # A thread that has checked a chunk would wait up to 5 ms, the default, for a loop that is busy receiving the next
    # ones (measured: a fifth of an upload's throughput).
    sys.setswitchinterval(0.0005)
    server = Server(settings)
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    listening = await server.start()
    if on_listening is not None:
        on_listening(listening)
    spare_what_stays()
    signalled = asyncio.create_task(signals.get())
    ends: list[asyncio.Future[Any]] = [signalled, server.service.unusable]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if not signalled.done():
        signalled.cancel()
        await server.stop(0)
        raise UnusableDeviceError(server.service.unusable.result())
    stopping = asyncio.create_task(server.stop(settings.server.drain_s))
    second = asyncio.create_task(signals.get())
    await asyncio.wait([stopping, second], return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)
        await server.stop(0)
    second.cancel()


def _tracing(settings: Settings, log: Any) -> Tracing | None:
    """Raises TracesError."""
    try:
        return tracing_of(settings.traces, log)
    except ExtraMissingError as error:
        raise TracesError(str(error)) from error


def _authenticator(settings: Settings, log: Any, uid_of: Callable[[str], int | None]) -> Identify:
    """Raises CredentialsError."""
    tokens = None
    if settings.auth.token_file:
        try:
            tokens = TokenFile(Path(settings.auth.token_file), log)
        except (OSError, TokenFileError) as error:
            raise CredentialsError(f"auth.token_file: {error}") from error
    certificates, uids = bool(settings.tls.client_ca_file), settings.auth.unix_uids
    return authenticator(tokens, certificates=certificates, uid_of=uid_of if uids else None)


def _remove_stale_socket(path: str) -> None:
    """A socket that a killed server left behind is removed; one that answers is somebody's. Raises SocketInUseError."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise SocketInUseError(f"{path} exists and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            raise SocketInUseError(f"cannot tell whether anybody listens on {path}") from error
    raise SocketInUseError(f"another server listens on {path}")
