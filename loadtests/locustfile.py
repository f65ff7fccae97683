"""What locust loads: `locust -f loadtests/locustfile.py --address unix:///run/streamindex.sock`."""

from __future__ import annotations

# isort: off
import loadtests.patched  # noqa: F401  before everything else

# isort: on
import os
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from locust import events

from loadtests.parameters import Parameters, add_arguments
from loadtests.requests_file import Outcome, Request, RequestsFile
from loadtests.scenarios import (
    AbortUser,
    ArrivalsUser,
    ChurnUser,
    DecodeUser,
    PrefillUser,
    SlowReaderUser,
    TenantsUser,
    UploadUser,
)
from loadtests.user import CallError

__all__ = [
    "AbortUser",
    "ArrivalsUser",
    "ChurnUser",
    "DecodeUser",
    "PrefillUser",
    "SlowReaderUser",
    "TenantsUser",
    "UploadUser",
]


@events.init_command_line_parser.add_listener
def _add_parameters(parser: ArgumentParser) -> None:
    add_arguments(parser)


@events.init.add_listener
def _set_up(environment: Any, **_others: Any) -> None:
    """Give every scenario its number of users, and write down the calls."""
    parameters = Parameters.of(environment.parsed_options)
    users = parameters.users()
    environment.user_classes = [each for each in environment.user_classes if each.scenario in users]
    for user_class in environment.user_classes:
        user_class.fixed_count = users[user_class.scenario]
    if parameters.requests_dir:
        _write_requests(environment.events, RequestsFile(Path(parameters.requests_dir), str(os.getpid())))


def _write_requests(hooks: Any, file: RequestsFile) -> None:
    def request(
        request_type: str,
        name: str,
        response_time: float,
        response_length: int,
        exception: Any,
        context: dict[str, Any],
        **_others: Any,
    ) -> None:
        outcome = Outcome.OK
        if exception is not None:
            outcome = exception.outcome if isinstance(exception, CallError) else Outcome.BROKEN
        compared, error = bool(context["compared"]), str(exception or "")
        now_s = time.monotonic()
        file.write(Request(now_s, request_type, name, response_time, response_length, outcome, compared, error))

    def user_error(user_instance: Any, exception: Exception, **_others: Any) -> None:
        error = f"{type(exception).__name__} {exception}"
        file.write(Request(time.monotonic(), user_instance.scenario, "(task)", 0.0, 0, Outcome.BROKEN, error=error))

    hooks.request.add_listener(request)
    hooks.user_error.add_listener(user_error)
    hooks.quit.add_listener(lambda **_others: file.close())
