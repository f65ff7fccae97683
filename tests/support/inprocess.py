"""A server in a thread of this process: for tests that decide who calls, or that look inside."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamindex_service.config import Settings
from streamindex_service.frontend.identity import anonymous
from streamindex_service.frontend.server import Server
from streamindex_service.telemetry.spans import Tracing
from tests.support.calls import TIMEOUT_S, Calls


class InProcessServer:
    """A server on a unix socket, on an event loop of its own. Ready when the block is entered."""

    def __init__(
        self,
        settings: dict[str, dict[str, Any]],
        identify: Callable[[Any], str] | None = anonymous,
        tracing: Tracing | None = None,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="streamindex-")
        self.socket_path = Path(self._directory.name) / "s.sock"
        server = {"tcp_address": "", "unix_socket": str(self.socket_path), **settings.get("server", {})}
        metrics = {"port": 0, **settings.get("metrics", {})}
        self._settings = Settings(**{**settings, "server": server, "metrics": metrics})
        self._identify = identify
        self._tracing = tracing
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server")
        self.server: Server

    @property
    def target(self) -> str:
        return f"unix://{self.socket_path}"

    def run(self, work: Callable[[], Any]) -> Any:
        """Call something on the server's loop; wait for it when it is awaitable."""

        async def on_loop() -> Any:
            result = work()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(TIMEOUT_S)

    def __enter__(self) -> InProcessServer:
        self._thread.start()

        async def start() -> None:
            self.server = Server(self._settings, self._identify, self._tracing)
            await self.server.start()

        self.run(start)
        with Calls(self.target) as calls:
            calls.wait_health(1)
        return self

    def __exit__(self, *_: object) -> None:
        self.run(lambda: self.server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._directory.cleanup()


def caller_in_metadata(context: Any) -> str:
    """Who calls, as a test says it."""
    return dict(context.invocation_metadata()).get("x-caller", "anonymous")
