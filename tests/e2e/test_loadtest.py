"""The load test in its own processes: the CI profile, a service that gives wrong answers, one that refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests.parameters import SCENARIOS
from loadtests.profiles import CPU
from loadtests.requests_file import Outcome, Request, read_requests
from loadtests.summary import MAIN_CALLS
from streamindex_service.testing.service import RunningService

SECONDS = 15
# A wrong reference stands for a wrong service: to the comparison they are the same.
TURNED_AROUND = """
from loadtests.locustfile import *
from loadtests.tensors import Tensors

right = Tensors.expected
Tensors.expected = lambda *arguments: right(*arguments)[::-1]
"""


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The CPU profile, a little shorter."""
    out = tmp_path_factory.mktemp("load")
    command = [
        sys.executable,
        "-m",
        "loadtests",
        "run",
        "--profile",
        "cpu",
        "--seconds",
        str(SECONDS),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    verdict = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("failed:", "loadtests:"))]
    assert done.returncode == 0, verdict or done.stderr[-4000:]
    return json.loads((out / "summary.json").read_text())


def test_the_ci_profile_passes(summary: dict[str, Any]) -> None:
    assert summary["passed"], summary["reasons"]
    calls = {(row["scenario"], row["call"]): row for row in summary["calls"]}
    assert not any(row[outcome] for row in calls.values() for outcome in Outcome if outcome is not Outcome.OK)
    for scenario in SCENARIOS:
        if scenario != "arrivals":  # the sweep's
            assert calls[scenario, MAIN_CALLS[scenario]]["ok"] > 0
    assert sum(row["compared"] for row in calls.values() if row["call"].startswith("Search")) > 10
    assert {call for _, call in calls} >= {
        "Search (left)",
        "AppendKeys (left)",
        "GetKeyCache (dropped)",
        "ForkKeyCache",
    }


def test_the_service_was_watched_meanwhile(summary: dict[str, Any]) -> None:
    load = summary["load"]
    assert len(load["seconds"]) > SECONDS
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
