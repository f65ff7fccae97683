"""Runs a load: the service if there is none, locust in processes of its own, and the watch beside it."""

from __future__ import annotations

import math
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
from loadtests.target import Target
from loadtests.watch import Watched, watched
from streamindex_service.testing.service import RunningService
from streamindex_service.testing.tokens import read_tokens, write_tokens

_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_STOP_S = 60  # how long tasks that run may go on when the time is over
_START_S = 60  # how long locust's own processes may take beside that


class LoadTestError(RuntimeError):
    """Locust did not run to its end, or could not begin."""


@dataclass(frozen=True)
class Measured:
    """What happened."""

    requests: list[Request]
    watch: Watched


@contextmanager
def service_for(profile: Profile, address: str | None) -> Iterator[Target]:
    """The given service, or one that is started with the profile's settings, a token for each user, and quotas.

    Raises LoadTestError when the tokens of the given one cannot be read.
    """
    if address is not None:
        yield Target(address, _given_tokens(profile.parameters.tokens_file))
        return
    # one for each user of a process, however locust shares the users out
    processes = max(1, profile.processes)
    users = processes * max(1, math.ceil(sum(profile.parameters.users().values()) / processes))
    limits = {**profile.parameters.quotas(), **profile.settings.get("limits", {})}
    callers = ["watch", *(f"user-{number}" for number in range(users))]
    with RunningService({**profile.settings, "limits": limits}, callers=callers) as service:
        yield Target(service.address, tuple(service.tokens.values()))


def measure(profile: Profile, target: Target) -> Measured:
    """Put the profile's load on the service. Raises LoadTestError."""
    with tempfile.TemporaryDirectory(prefix="streamindex-load-") as name:
        tokens_file = Path(name, "tokens")
        if target.tokens:
            write_tokens(tokens_file, target.user_tokens)
        placed = replace(
            profile.parameters,
            address=target.address,
            tokens_file=str(tokens_file) if target.tokens else "",
            tokens_processes=max(1, profile.processes),
            requests_dir=name,
        )
        with watched(target) as watch:
            _run_locust(replace(profile, parameters=placed))
        return Measured(list(read_requests(Path(name))), watch)


def _given_tokens(file: str) -> list[str]:
    try:
        return read_tokens(Path(file)) if file else []
    except (OSError, ValueError) as error:
        raise LoadTestError(f"tokens_file: {error}") from error


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
