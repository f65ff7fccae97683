"""Offered load against latency and refusals: where the knee is.

Arrivals come at a fixed rate, whatever the service does, and latency counts from when a call should have begun: a
service that falls behind cannot slow its own measurement down. The rate grows by `factor` a step, until two steps in a
row are beyond the knee: p99 above its limit, or more than 1 % of the calls refused, late or failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loadtests.parameters import SCENARIOS
from loadtests.profiles import Profile
from loadtests.requests_file import Outcome
from loadtests.run import LoadTestError, measure
from loadtests.summary import call_rows, header
from loadtests.target import Target

_REFUSED_SHARE = 0.01
_P99_GROWTH = 5.0  # of the first step's; the default limit
_BEYOND = 2


@dataclass(frozen=True)
class Plan:
    """`p99_limit_ms` None: five times the p99 of the first step."""

    first_per_s: float = 10.0
    factor: float = 1.5
    max_steps: int = 14
    step_s: int = 10
    p99_limit_ms: float | None = None


def sweep(profile: Profile, target: Target, plan: Plan) -> dict[str, Any]:
    """Run the steps. Raises LoadTestError when nothing was answered, or the load test itself was the limit."""
    steps: list[dict[str, Any]] = []
    limit_ms = plan.p99_limit_ms
    offered = plan.first_per_s
    while len(steps) < plan.max_steps:
        step = _step(profile, target, offered, plan.step_s)
        steps.append(step)
        if limit_ms is None:
            if step["p99_ms"] is None:
                raise LoadTestError("no call of the first step was answered")
            limit_ms = _P99_GROWTH * step["p99_ms"]
        if len(steps) >= _BEYOND and not any(within(each, limit_ms) for each in steps[-_BEYOND:]):
            break
        offered *= plan.factor
    assert limit_ms is not None, "there was a step"
    return {
        "profile": profile.name,
        "header": header(target),
        "parameters": {
            name: getattr(profile.parameters, name)
            for name in ("heads", "head_dim", "ratio", "top_k", "context_keys", "arrivals_rows", "arrivals_deadline_s")
        },
        "step_s": plan.step_s,
        "p99_limit_ms": limit_ms,
        "knee_per_s": knee(steps, limit_ms),
        "steps": steps,
    }


def within(step: Mapping[str, Any], limit_ms: float) -> bool:
    """Whether the service bore this load."""
    turned_away = step["refused_share"] + step["failed_share"]
    return step["p99_ms"] is not None and step["p99_ms"] <= limit_ms and turned_away <= _REFUSED_SHARE


def knee(steps: Sequence[Mapping[str, Any]], limit_ms: float) -> float | None:
    """The last offered load before the first that the service did not bear; None if it bore none."""
    last = None
    for step in steps:
        if not within(step, limit_ms):
            break
        last = step["offered_per_s"]
    return last


def _step(profile: Profile, target: Target, offered_per_s: float, seconds: int) -> dict[str, Any]:
    changes: dict[str, Any] = {f"{scenario}_users": 0 for scenario in SCENARIOS}
    changes |= {"arrivals_users": max(1, profile.processes), "arrivals_rate": offered_per_s}
    parameters = replace(profile.parameters, **changes)
    measured = measure(replace(profile, seconds=seconds, parameters=parameters), target)
    rows = call_rows(measured.requests, seconds)
    broken = [error for row in rows if row[Outcome.BROKEN] for error in row["errors"]]
    if broken:
        raise LoadTestError(f"the load test was the limit at {offered_per_s:.0f} calls a second: {broken[0]}")
    row = next((row for row in rows if row["call"] == "SearchBatch"), None)
    if row is None:
        raise LoadTestError(f"nothing arrived at {offered_per_s:.0f} calls a second")
    if row[Outcome.WRONG]:
        raise LoadTestError(f"{row[Outcome.WRONG]} answers were wrong")
    arrivals = [each for each in measured.requests if each.call == "SearchBatch"]
    starts = [each.end_s - each.latency_ms / 1000 for each in arrivals]
    last_s = max(each.end_s for each in arrivals)
    # The first arrival comes once there are caches to search, so a step's own time is shorter than it was given.
    return {
        "offered_per_s": offered_per_s,
        "arrived_per_s": len(starts) / max(max(starts) - min(starts), 1.0),
        "answered_per_s": row[Outcome.OK] / max(last_s - min(starts), 1.0),
        "p50_ms": row["p50_ms"],
        "p99_ms": row["p99_ms"],
        "refused_share": row[Outcome.REFUSED] / row["count"],
        "failed_share": row[Outcome.FAILED] / row["count"],
        "queued_tiles_most": max((sample.load.queued_tiles for sample in measured.watch.samples), default=0),
    }
