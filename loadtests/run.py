"""Runs a load: the service if there is none, locust in processes of its own, and the watch beside it."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loadtests.profiles import Profile
from loadtests.requests_file import Request, read_requests
from loadtests.watch import Watched, watched
from streamindex_service.testing.service import RunningService

_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_STOP_S = 60  # how long tasks that run may go on when the time is over
_START_S = 60  # how long locust's own processes may take beside that


class LoadTestError(RuntimeError):
    """Locust did not run to its end."""


@dataclass(frozen=True)
class Measured:
    """What happened."""

    requests: list[Request]
    watch: Watched


@contextmanager
def service_for(profile: Profile, address: str | None) -> Iterator[str]:
    """The address of the service: the given one, or that of a service started with the profile's settings."""
    if address is not None:
        yield address
        return
    with RunningService(profile.settings) as service:
        yield service.address


def measure(profile: Profile, address: str) -> Measured:
    """Put the profile's load on the service at `address`. Raises LoadTestError."""
    with tempfile.TemporaryDirectory(prefix="streamindex-load-") as directory:
        placed = replace(profile, parameters=replace(profile.parameters, address=address, requests_dir=directory))
        with watched(address) as watch:
            _run_locust(placed)
        return Measured(list(read_requests(Path(directory))), watch)


def _run_locust(profile: Profile) -> None:
    users = sum(profile.parameters.users().values())
    common = [sys.executable, "-m", "locust", "--locustfile", str(_LOCUSTFILE), *profile.parameters.arguments()]
    head = [*common, "--headless", "--only-summary", "--exit-code-on-error", "0", "--stop-timeout", str(_STOP_S)]
    head += ["--users", str(users), "--spawn-rate", str(users), "--run-time", f"{profile.seconds}s"]
    with ExitStack() as workers:
        if profile.processes:
            where = ["127.0.0.1", str(_free_port())]
            head += ["--master", "--master-bind-host", where[0], "--master-bind-port", where[1]]
            head += ["--expect-workers", str(profile.processes)]
            for _ in range(profile.processes):
                command = [*common, "--worker", "--master-host", where[0], "--master-port", where[1]]
                workers.enter_context(_ended(subprocess.Popen(command)))
        try:
            code = subprocess.run(head, timeout=profile.seconds + _STOP_S + _START_S, check=False).returncode
        except subprocess.TimeoutExpired as error:
            raise LoadTestError("locust did not come to its end") from error
    if code:
        raise LoadTestError(f"locust ended with exit code {code}")


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A worker, which ends with its master, or is made to."""
    try:
        yield
        process.wait(_STOP_S)
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
