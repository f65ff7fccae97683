"""What a run comes to: figures of each call, how they went over time, the service's view, and a verdict."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np

from loadtests.profiles import Profile
from loadtests.requests_file import Outcome, Request
from loadtests.target import Target
from loadtests.watch import Sample, Watched

MAIN_CALLS = {
    "decode": "SearchBatch",
    "prefill": "Search",
    "upload": "AppendKeys",
    "tenants": "Search (interactive)",
    "churn": "Search",
    "slow_reader": "Search (slow)",
    "abort": "Search (after leaving one)",
    "arrivals": "SearchBatch",
}
"""The call of each scenario that is shown over time, and that must have been answered at least once."""

_BINS = 120
# where the service and its tokens were is nobody's business; what was sent is
_OF_THE_HOST = ("address", "tokens_file", "tokens_processes", "requests_dir")


def summarise(profile: Profile, requests: Sequence[Request], watch: Watched, header: dict[str, str]) -> dict[str, Any]:
    """The whole as plain values, for a file."""
    start = min((each.end_s - each.latency_ms / 1000 for each in requests), default=0.0)
    calls = call_rows(requests, profile.seconds)
    reasons = complaints(profile, calls, watch)
    return {
        "profile": profile.name,
        "seconds": profile.seconds,
        "processes": profile.processes,
        "header": header,
        "parameters": {name: value for name, value in asdict(profile.parameters).items() if name not in _OF_THE_HOST},
        "passed": not reasons,
        "reasons": reasons,
        "calls": calls,
        "series": series(requests, start, profile.seconds),
        "load": load_series(watch.samples, start),
    }


def call_rows(requests: Iterable[Request], seconds: float) -> list[dict[str, Any]]:
    """Figures of each call of each scenario. Latencies are of those that were answered."""
    groups: dict[tuple[str, str], list[Request]] = defaultdict(list)
    for request in requests:
        groups[request.scenario, request.call].append(request)
    rows = []
    for (scenario, call), group in sorted(groups.items()):
        outcomes = Counter(each.outcome for each in group)
        answered = [each.latency_ms for each in group if each.outcome is Outcome.OK]
        p50, p95, p99, most = np.percentile(answered, (50, 95, 99, 100)).tolist() if answered else [None] * 4
        rows.append(
            {
                "scenario": scenario,
                "call": call,
                "count": len(group),
                **{outcome.value: outcomes[outcome] for outcome in Outcome},
                "compared": sum(each.compared for each in group),
                "per_s": len(group) / seconds,
                "mb_per_s": sum(each.moved_bytes for each in group) / 1e6 / seconds,
                "p50_ms": p50,
                "p95_ms": p95,
                "p99_ms": p99,
                "max_ms": most,
                "errors": dict(Counter(each.error for each in group if each.error).most_common(10)),
            }
        )
    return rows


def complaints(profile: Profile, calls: Sequence[dict[str, Any]], watch: Watched) -> list[str]:
    """Why the run has not passed; nothing if it has."""
    reasons = []
    for outcome in Outcome:
        number = sum(row[outcome.value] for row in calls)
        if outcome is not Outcome.OK and number:
            reasons.append(f"{number} calls {outcome.value}")
    answered = {(row["scenario"], row["call"]) for row in calls if row["ok"]}
    reasons += [
        f"no {MAIN_CALLS[scenario]} of {scenario} was answered"
        for scenario in profile.parameters.users()
        if (scenario, MAIN_CALLS[scenario]) not in answered
    ]
    compared = sum(row["compared"] for row in calls if row["call"].startswith("Search"))
    if profile.parameters.check_share and not compared:
        reasons.append("no answer was compared with the reference")
    reasons += [f"left behind: {each}" for each in watch.left]
    if watch.error:
        reasons.append(f"the load could not be watched: {watch.error}")
    over = {
        name
        for sample in watch.samples
        for name, ledger in sample.load.ledgers.items()
        if ledger.peak_bytes > ledger.limit_bytes
    }
    return reasons + [f"ledger {name} passed its limit" for name in sorted(over)]


def series(requests: Iterable[Request], start_s: float, seconds: float) -> dict[str, Any]:
    """Calls and megabytes a second, refusals and failures, and the latency of main calls, in bins of time."""
    width = max(1.0, seconds / _BINS)
    bins: dict[int, list[Request]] = defaultdict(list)
    for request in requests:
        bins[int((request.end_s - start_s) / width)].append(request)
    count = max(bins, default=-1) + 1
    groups = [bins[number] for number in range(count)]
    latencies: dict[str, Any] = {}
    for scenario, call in MAIN_CALLS.items():
        answered = [
            [each.latency_ms for each in group if (each.scenario, each.call, each.outcome) == (scenario, call, "ok")]
            for group in groups
        ]
        if any(answered):
            latencies[scenario] = {
                f"p{rank}_ms": [float(np.percentile(each, rank)) if each else None for each in answered]
                for rank in (50, 99)
            }
    return {
        "seconds": [width * (number + 0.5) for number in range(count)],
        "calls_per_s": [len(group) / width for group in groups],
        "mb_per_s": [sum(each.moved_bytes for each in group) / 1e6 / width for group in groups],
        "refused_per_s": [sum(each.outcome is Outcome.REFUSED for each in group) / width for group in groups],
        "failed_per_s": [
            sum(each.outcome not in (Outcome.OK, Outcome.REFUSED) for each in group) / width for group in groups
        ],
        "latency": latencies,
    }


def load_series(samples: Sequence[Sample], start_s: float) -> dict[str, Any]:
    """Ledgers, queue and device over time, as WatchLoad told them."""
    ledgers = samples[0].load.ledgers if samples else {}
    return {
        "seconds": [sample.at_s - start_s for sample in samples],
        "ledgers": {
            name: {
                "limit_bytes": ledger.limit_bytes,
                "reserved_bytes": [sample.load.ledgers[name].reserved_bytes for sample in samples],
            }
            for name, ledger in ledgers.items()
        },
        "queued_tiles": [sample.load.queued_tiles for sample in samples],
        "queued_s": [sample.load.queued_us / 1e6 for sample in samples],
        "running_searches": [sample.load.running_searches for sample in samples],
        "device_busy_share": _busy_shares(samples),
    }


def header(target: Target) -> dict[str, str]:
    """The service, its device, versions and date."""
    with target.connect() as client:
        capabilities = client.capabilities()
    return {
        "service": capabilities.service_version,
        "device": capabilities.device,
        "implementation": capabilities.implementation,
        "locust": version("locust"),
        "python": platform.python_version(),
        # a tree that was copied without its history is told what it is
        "commit": os.environ.get("COMMIT") or _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _busy_shares(samples: Sequence[Sample]) -> list[float]:
    shares = [0.0] * min(1, len(samples))
    for before, after in pairwise(samples):
        passed_us = 1000 * (after.load.uptime_ms - before.load.uptime_ms)
        busy_us = after.load.device_busy_us - before.load.device_busy_us
        shares.append(min(1.0, busy_us / passed_us) if passed_us > 0 else 0.0)
    return shares


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
