"""The load test in its own processes: the CI profile, a service that gives wrong answers, one that refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtests.parameters import SCENARIOS
from loadtests.profiles import CPU, Profile
from loadtests.requests_file import Outcome, Request, read_requests
from loadtests.run import measure
from loadtests.summary import MAIN_CALLS
from loadtests.target import Target
from streamindex_service.testing.service import RunningService

PROFILE_TIMEOUT_S = CPU.seconds + 200  # starting and stopping have limits of their own
# A wrong reference stands for a wrong service: to the comparison they are the same.
TURNED_AROUND = """
from loadtests.locustfile import *
from loadtests.tensors import Tensors

right = Tensors.expected
Tensors.expected = lambda *arguments: right(*arguments)[::-1]
"""


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the CPU profile, as it is."""
    out = tmp_path_factory.mktemp("load")
    command = [sys.executable, "-m", "loadtests", "run", "--profile", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROFILE_TIMEOUT_S, check=False)
    verdict = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("failed:", "loadtests:"))]
    assert done.returncode == 0, verdict or done.stderr[-4000:]
    return json.loads((out / "summary.json").read_text())


@pytest.mark.timeout(PROFILE_TIMEOUT_S + 20)
def test_the_ci_profile_passes(summary: dict[str, Any]) -> None:
    assert summary["passed"], summary["reasons"]
    assert summary["seconds"] == CPU.seconds
    calls = {(row["scenario"], row["call"]): row for row in summary["calls"]}
    assert not any(row[outcome] for row in calls.values() for outcome in Outcome if outcome is not Outcome.OK)
    for scenario in SCENARIOS:
        if scenario != "arrivals":  # the sweep's
            assert calls[scenario, MAIN_CALLS[scenario]]["ok"] > 0
    assert sum(row["compared"] for row in calls.values() if row["call"].startswith("Search")) > 10
    assert {call for _, call in calls} >= {
        "Search (left)",
        "AppendKeys (left)",
        "GetKeyCache (after leaving an upload)",
        "GetKeyCache (dropped)",
        "ForkKeyCache",
    }


@pytest.mark.timeout(PROFILE_TIMEOUT_S + 20)
def test_the_service_was_watched_meanwhile(summary: dict[str, Any]) -> None:
    load = summary["load"]
    assert len(load["seconds"]) > CPU.seconds
    assert load["ledgers"].keys() == {"hbm", "host", "ingress"}
    assert max(load["ledgers"]["host"]["reserved_bytes"]) > 0
    assert load["ledgers"]["host"]["reserved_bytes"][-1] == 0
    assert max(load["running_searches"]) > 0
    assert max(load["device_busy_share"]) > 0


def locust(directory: Path, locustfile: Path, service: RunningService, user: str, *options: str) -> list[Request]:
    """Five seconds of one kind of user; the calls."""
    command = [sys.executable, "-m", "locust", "-f", str(locustfile), "--headless", "-u", "1", "-t", "5s"]
    command += ["--stop-timeout", "20", "--address", service.address, "--requests-dir", str(directory), *options, user]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    requests = list(read_requests(directory))
    assert requests, done.stderr
    assert done.returncode == 1, "locust ends with 1 when calls failed"
    return requests


def test_a_wrong_answer_is_a_failure(tmp_path: Path, roomy_service: RunningService) -> None:
    locustfile = tmp_path / "locustfile.py"
    locustfile.write_text(TURNED_AROUND)
    requests = locust(tmp_path, locustfile, roomy_service, "DecodeUser", "--check-share", "1", "--decode-rate", "10")
    searches = [each for each in requests if each.call == "SearchBatch"]
    assert searches
    assert {each.outcome for each in searches} == {Outcome.WRONG}
    assert all("WrongAnswerError" in each.error for each in searches)


def test_a_refusal_is_told_apart_from_a_failure(tmp_path: Path) -> None:
    settings = {**CPU.settings, "server": {"max_caches": 1}}
    locustfile = Path("loadtests/locustfile.py").absolute()
    with RunningService(settings) as service:
        requests = locust(tmp_path, locustfile, service, "ChurnUser", "--churn-rate", "5")
    forks = [each for each in requests if each.call == "ForkKeyCache"]
    assert {(each.outcome, each.error) for each in forks} == {
        (Outcome.REFUSED, "ResourceExhaustedError RESOURCE_EXHAUSTED/TOO_MANY")
    }
    assert {each.outcome for each in requests if each.call in ("AppendKeys", "Search", "DeleteKeyCache")} == {
        Outcome.OK
    }


def decoding(users: int, processes: int) -> Profile:
    """Five seconds of users that decode, and nothing else."""
    counts = {f"{scenario}_users": 0 for scenario in SCENARIOS} | {"decode_users": users}
    parameters = replace(CPU.parameters, context_keys=1024, **counts)
    return replace(CPU, seconds=5, processes=processes, parameters=parameters)


def test_each_user_is_a_caller_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quota of a caller bears one user, so users that share a token are refused, and no others."""
    commands: list[str] = []

    class Recorded(subprocess.Popen[Any]):
        def __init__(self, command: list[str], *arguments: Any, **options: Any) -> None:
            commands.extend(command)
            super().__init__(command, *arguments, **options)

    settings = {**CPU.settings, "limits": CPU.parameters.quotas()}
    with RunningService(settings, callers=["watch", "1", "2", "3", "4"]) as service:
        monkeypatch.setattr(subprocess, "Popen", Recorded)
        watch, *tokens = service.tokens.values()
        apart = measure(decoding(3, processes=2), Target(service.address, (watch, *tokens)))
        together = measure(decoding(2, processes=0), Target(service.address, (watch, tokens[0])))
    assert {each.outcome for each in apart.requests} == {Outcome.OK}
    assert sum(each.call == "CreateKeyCache" for each in apart.requests) == 3 * CPU.parameters.decode_sequences
    refused = {each.error for each in together.requests if each.outcome is Outcome.REFUSED}
    assert refused == {"ResourceExhaustedError RESOURCE_EXHAUSTED/TOO_MANY"}
    for result in (apart, together):
        assert result.watch.samples
        assert not result.watch.error
    assert "--tokens-file" in " ".join(commands)
    assert not any(token in each for token in service.tokens.values() for each in commands)


def test_a_sweep_ends_with_its_steps(tmp_path: Path, roomy_service: RunningService) -> None:
    command = [sys.executable, "-m", "loadtests", "sweep", "--address", roomy_service.address, "--out", str(tmp_path)]
    command += ["--first", "40", "--steps", "1", "--step-seconds", "5", "--set", "context_keys=1024"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "sweep.json").read_text())
    (step,) = result["steps"]
    assert step["offered_per_s"] == 40
    assert step["arrived_per_s"] == pytest.approx(40, rel=0.6)  # a Poisson process, of 20 calls at the very least
    assert 0 < step["p50_ms"] <= step["p99_ms"]
    assert result["p99_limit_ms"] == pytest.approx(5 * step["p99_ms"])
    assert result["knee_per_s"] == 40
