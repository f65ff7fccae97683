"""The metrics port: /metrics, the status page, health. HTTP/1.1 as far as GET and HEAD need it, on the event loop.

One request a connection, of bounded length and time; connections beyond a bound are closed. Figures are read on the
loop and written out as text on a thread, so that a scrape does not hold up a decode step. No body is ever read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from google.protobuf import json_format
from prometheus_client import ProcessCollector, exposition
from prometheus_client.core import Metric

from streamindex_service.config import MetricsSettings, is_loopback
from streamindex_service.frontend import metrics, status_page
from streamindex_service.frontend.load import load_of
from streamindex_service.frontend.service import Service

_MAX_HEAD_BYTES = 8192
_REFRESH_S = 0.5  # for the device's own figures; a worker that hangs must not hang this
_NOBODY = ""  # the page is no caller: all callers have labels for names
_TEXT = "text/plain; charset=utf-8"
_REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
            408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}  # fmt: skip
_HEADERS = (
    "Cache-Control: no-store",
    "X-Content-Type-Options: nosniff",
    "Referrer-Policy: no-referrer",
    "Cross-Origin-Resource-Policy: same-origin",
    "Connection: close",
)


class Answer(NamedTuple):
    """What is sent back."""

    status: int
    body: bytes
    content_type: str = _TEXT
    headers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A request's first line and headers; names are in lower case."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)


class MetricsServer:
    """Serves a service's figures. `start`, then `stop`."""

    def __init__(self, service: Service, settings: MetricsSettings) -> None:
        self._service = service
        self._settings = settings
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._process = ProcessCollector(registry=None)
        self._routes: dict[str, Callable[[Request], Awaitable[Answer]]] = {
            "/": self._page,
            "/status.json": self._status,
            "/metrics": self._metrics,
            "/healthz": self._ready,
            "/livez": self._alive,
        }

    async def start(self) -> str | None:
        """Listen; host:port, None when it is switched off. Raises OSError."""
        wanted = self._settings
        if not wanted.port:
            return None
        self._server = await asyncio.start_server(self._connected, wanted.host, wanted.port, limit=_MAX_HEAD_BYTES)
        return f"[{wanted.host}]:{wanted.port}" if ":" in wanted.host else f"{wanted.host}:{wanted.port}"

    async def stop(self) -> None:
        """Close the port and what is connected."""
        if self._server is None:
            return
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            if len(self._connections) >= self._settings.max_connections:
                return
            self._connections.add(task)
            async with asyncio.timeout(self._settings.timeout_s):
                await self._serve(reader, writer)
        except (TimeoutError, ConnectionError):
            pass  # whoever is there does not send, does not read, or has gone
        except Exception:
            self._service.log.error("metrics_request_failed", exc_info=True)
        finally:
            self._connections.discard(task)
            writer.transport.abort()  # not `close`, which waits for a peer that does not read

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request: Request | None = None
        try:
            request = parse_head(await reader.readuntil(b"\r\n\r\n"))
        except asyncio.IncompleteReadError:
            return
        except asyncio.LimitOverrunError:
            answer = Answer(431, b"the request is too long\n")
        except ValueError:
            answer = Answer(400, b"this is no HTTP request\n")
        else:
            answer = await self._answer(request)
        head = [
            f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}",
            f"Content-Type: {answer.content_type}",
            f"Content-Length: {len(answer.body)}",
            *answer.headers,
            *_HEADERS,
        ]
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n")
        if request is None or request.method != "HEAD":
            writer.write(answer.body)
        writer.write_eof()
        await writer.drain()
        # Closed with something unread, a connection is reset, and the peer may lose the answer: wait for its end.
        while await reader.read(_MAX_HEAD_BYTES):
            pass

    async def _answer(self, request: Request) -> Answer:
        if request.method not in ("GET", "HEAD"):
            return Answer(405, b"GET and HEAD only\n", headers=("Allow: GET, HEAD",))
        if not self._is_for_us(request.headers.get("host", "")):
            return Answer(403, b"not under this name\n")
        route = self._routes.get(request.path.partition("?")[0])
        return Answer(404, b"no such page\n") if route is None else await route(request)

    def _is_for_us(self, host: str) -> bool:
        """A page from elsewhere whose name was made to resolve to this host (DNS rebinding) must not read figures."""
        if self._settings.allow_remote:
            return True
        name = host[: host.rindex("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
        return is_loopback(name.strip("[]"))

    async def _page(self, request: Request) -> Answer:
        return Answer(
            200, status_page.HTML, "text/html; charset=utf-8", (f"Content-Security-Policy: {status_page.CSP}",)
        )

    async def _status(self, request: Request) -> Answer:
        load = await load_of(self._service, _NOBODY)
        figures = json_format.MessageToDict(
            load, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        body = json.dumps({"load": figures, "calls": status_page.calls(self._service), "server": self._about()})
        return Answer(200, body.encode(), "application/json")

    async def _metrics(self, request: Request) -> Answer:
        link = self._service.supervisor.link
        if link is not None:
            await link.refresh(_REFRESH_S)
        found = metrics.families(self._service)
        encode, content_type = exposition.choose_encoder(request.headers.get("accept", ""))
        body = await asyncio.to_thread(lambda: encode(_Snapshot([*found, *self._process.collect()])))
        return Answer(200, body, content_type)

    async def _ready(self, request: Request) -> Answer:
        if self._service.governor.paused or self._service.draining.is_set():
            return Answer(503, b"not ready\n")
        return Answer(200, b"ready\n")

    async def _alive(self, request: Request) -> Answer:
        return Answer(200, b"alive\n")

    def _about(self) -> dict[str, str]:
        info = self._service.worker_info
        return status_page.about(info.device_name if info else "", info.implementation if info else "")


class _Snapshot:
    """What prometheus_client's encoders take for a registry."""

    def __init__(self, found: list[Metric]) -> None:
        self._found = found

    def collect(self) -> list[Metric]:
        return self._found


def parse_head(head: bytes) -> Request:
    """A request from its first line and headers, with the empty line after them. Raises ValueError."""
    first, *lines = head.decode("ascii").split("\r\n")[:-2]
    method, path, version = first.split(" ")
    if not version.startswith("HTTP/1.") or not path.startswith("/"):
        raise ValueError("not HTTP/1")
    headers = {}
    for line in lines:
        name, separator, value = line.partition(":")
        if not separator or name != name.strip() or not name:
            raise ValueError("not a header")
        headers[name.lower()] = value.strip()
    return Request(method, path, headers)
