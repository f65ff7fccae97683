"""A real service in its own processes, for tests, benchmarks and the demo.

with RunningService({"worker": {"device": "cpu"}}) as service:
    client = streamindex_client.connect(service.address)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2

from streamindex_service.testing.tokens import write_token_file

_ADDRESS = re.compile(r"(?<![\w/])(?:localhost|[\d.]+|\[[\da-fA-F:.]+\]):\d+")
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_POLL_S = 0.05
_LOG_TAIL_BYTES = 8192
_PREFIX = "STREAMINDEX_"


class ServiceStartError(RuntimeError):
    """The service ended, or was not ready in time; the message ends with the tail of its log."""


def environment_of(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Settings as environment variables: `STREAMINDEX_SECTION__NAME`."""
    return {
        f"{_PREFIX}{section}__{name}".upper(): value if isinstance(value, str) else json.dumps(value)
        for section, values in settings.items()
        for name, value in values.items()
    }


def process_children(pid: int) -> list[int]:
    """Process ids of the children of a process, zombies left out."""
    children = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError):
            # the name in parentheses may hold anything, so the fields are counted from behind it
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                children.append(int(entry.name))
    return sorted(children)


class RunningService:
    """`streamindex serve` as a child process on a unix socket, and with `tcp` on a free loopback port as well.

    `settings`: sections as dictionaries; they win over the caller's own `STREAMINDEX_*` variables, of which none is
    passed on. `callers`: names of callers, each with one of `tokens`; with none, everybody is the same caller.
    `program`: what the interpreter runs in place of `streamindex`, for a service with faults built in. `process`: the
    child. Raises ServiceStartError when it is not SERVING within `start_timeout_s`.
    """

    def __init__(
        self,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        tcp: bool = False,
        callers: Sequence[str] = (),
        start_timeout_s: float = 120.0,
        warnings_as_errors: bool = False,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "streamindex_service"),
    ) -> None:
        self._program = program
        self._start_timeout_s = start_timeout_s
        self._directory = Path(tempfile.mkdtemp(prefix="streamindex-"))
        self.socket_path = self._directory / "s.sock"
        self._tcp = tcp
        server = {"unix_socket": str(self.socket_path), "tcp_address": "127.0.0.1:0" if tcp else ""}
        sections = {name: dict(values) for name, values in (settings or {}).items()}
        sections["server"] = {**server, **sections.get("server", {})}
        sections["metrics"] = {"port": 0, **sections.get("metrics", {})}  # many run at a time
        self.tokens: Mapping[str, str] = {}
        if callers:
            token_file = self._directory / "tokens"
            self.tokens = write_token_file(token_file, callers)
            sections["auth"] = {**sections.get("auth", {}), "token_file": str(token_file)}
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(_PREFIX)},
            **(environment or {}),
            **environment_of(sections),
        }
        if warnings_as_errors:
            self._environment["PYTHONWARNINGS"] = "error"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The frontend."""
        assert self._process is not None, "the service was not started"
        return self._process

    @property
    def address(self) -> str:
        """The unix socket, as a client's target."""
        return f"unix://{self.socket_path}"

    @property
    def tcp_address(self) -> str:
        """host:port, as the service printed it."""
        found = _ADDRESS.search(self._stdout_path.read_text())
        if found is None:
            raise RuntimeError("the service listens on no TCP port")
        return found[0]

    def start(self) -> None:
        """Start and wait until the service is SERVING."""
        try:
            with _interrupt_held_back():  # or there might be a process that nobody knows of
                self._launch()
            self._wait_serving()
        except BaseException:
            self.stop(grace_s=2.0)
            raise

    def _launch(self) -> None:
        with self._stdout_path.open("wb") as stdout, self._stderr_path.open("wb") as stderr:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, *self._program, "serve"],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=self._environment,
                # a Ctrl-C in the terminal is the caller's; the caller then stops this service in order
                start_new_session=True,
            )

    def redirect_log(self, path: Path) -> None:
        """Have standard error go there and not to a file of its own. For before the start."""
        self._stderr_path.symlink_to(path)

    def worker_pids(self) -> list[int]:
        """Processes that the frontend started."""
        return process_children(self.process.pid)

    def log_tail(self) -> str:
        """The end of what the service wrote to standard error."""
        if not self._stderr_path.exists():
            return ""
        with self._stderr_path.open("rb") as log:
            log.seek(max(0, self._stderr_path.stat().st_size - _LOG_TAIL_BYTES))
            return log.read(_LOG_TAIL_BYTES).decode(errors="replace")

    def stop(self, grace_s: float = 30.0) -> int | None:
        """SIGTERM, wait, then SIGKILL; remove the directory. Gives the exit code, None when it was never started.

        Interrupted, it does not wait, and leaves nothing all the same.
        """
        try:
            return None if self._process is None else self._end(self._process, grace_s)
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _end(self, process: subprocess.Popen[bytes], grace_s: float) -> int:
        workers: list[int] = []
        try:
            workers = self.worker_pids()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            return process.wait(grace_s)
        except BaseException as error:
            process.kill()
            code = process.wait()
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return code

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _stdout_path(self) -> Path:
        return self._directory / "stdout"

    @property
    def _stderr_path(self) -> Path:
        return self._directory / "stderr"

    def _wait_serving(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        with grpc.insecure_channel(self.address, [("grpc.max_reconnect_backoff_ms", 200)]) as channel:
            check = channel.unary_unary(
                _HEALTH_CHECK,
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            while time.monotonic() < deadline:
                code = self.process.poll()
                if code is not None:
                    raise ServiceStartError(f"the service ended with exit code {code}:\n{self.log_tail()}")
                with contextlib.suppress(grpc.RpcError):
                    # a call to a socket that is not there yet fails at once; the pause below keeps this loop calm
                    if check(health_pb2.HealthCheckRequest(), timeout=2.0).status == _SERVING:
                        return
                time.sleep(_POLL_S)
        raise ServiceStartError(f"the service was not ready in {self._start_timeout_s:.0f} s:\n{self.log_tail()}")


@contextlib.contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """SIGINT that comes within is raised at the end; the process that is started has the usual handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


_SERVING = health_pb2.HealthCheckResponse.SERVING
