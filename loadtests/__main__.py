"""The command line: run, sweep, report."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtests.profiles import PROFILES, Profile
from loadtests.report import write_reports
from loadtests.run import LoadTestError, measure, service_for
from loadtests.summary import header, summarise
from loadtests.sweep import Plan, sweep


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if the run passed, 1 if not, 2 for a wrong command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "report":
            print(*write_reports(arguments.directory), sep="\n")
            return 0
        profile = _chosen(arguments)
    except (ValueError, LookupError) as error:
        parser.error(str(error))
    try:
        result, words, passed = (_run if arguments.command == "run" else _sweep)(profile, arguments)
    except LoadTestError as error:
        print(f"loadtests: {error}", file=sys.stderr)
        return 1
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    figures = out / ("summary.json" if arguments.command == "run" else "sweep.json")
    figures.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(words, figures, sep="\n")
    try:
        print(*write_reports(out), sep="\n")
    except ImportError as error:
        print(f"no report: {error}; where matplotlib is: python -m loadtests report DIR", file=sys.stderr)
    return 0 if passed else 1


def _run(profile: Profile, arguments: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    with service_for(profile, arguments.address) as target:
        about = header(target)
        measured = measure(profile, target)
    summary = summarise(profile, measured.requests, measured.watch, about)
    passed: bool = summary["passed"]
    words = f"passed: {len(measured.requests)} calls" if passed else f"failed: {'; '.join(summary['reasons'])}"
    return summary, words, passed


def _sweep(profile: Profile, arguments: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    plan = Plan(arguments.first, arguments.factor, arguments.steps, arguments.step_seconds, arguments.p99_ms)
    with service_for(profile, arguments.address) as target:
        result = sweep(profile, target, plan)
    knee = result["knee_per_s"]
    return result, "knee: none" if knee is None else f"knee: {knee:.0f} calls a second", True


def _chosen(arguments: argparse.Namespace) -> Profile:
    """The profile with what the command line changes. Raises ValueError."""
    given = dict(each.partition("=")[::2] for each in arguments.set)
    profile = PROFILES[arguments.profile]
    profile = replace(profile, parameters=profile.parameters.with_texts(given))
    if profile.parameters.tokens_file and arguments.address is None:
        raise ValueError("tokens_file is for --address; a service that is started has tokens of its own")
    seconds = getattr(arguments, "seconds", None)
    if seconds is not None:
        profile = replace(profile, seconds=seconds)
    return profile if arguments.processes is None else replace(profile, processes=arguments.processes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="put a profile's load on the service, and report")
    run.add_argument("--seconds", type=int, help="how long; the profile's by default")
    ramp = commands.add_parser("sweep", help="offered load against latency and refusals: where the knee is")
    ramp.add_argument("--first", type=float, default=Plan.first_per_s, help="calls a second of the first step")
    ramp.add_argument("--factor", type=float, default=Plan.factor, help="growth from step to step")
    ramp.add_argument("--steps", type=int, default=Plan.max_steps, help="at most so many")
    ramp.add_argument("--step-seconds", type=int, default=Plan.step_s)
    ramp.add_argument("--p99-ms", type=float, help="limit of p99; five times the first step's by default")
    for command in (run, ramp):
        command.add_argument("--profile", choices=sorted(PROFILES), default="cpu")
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the report goes")
        command.add_argument("--address", help="a service that runs; by default one is started for the profile")
        command.add_argument("--processes", type=int, help="locust processes beside the one that counts")
        command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a parameter")
    report = commands.add_parser("report", help="write the reports of what lies in DIR once more")
    report.add_argument("directory", type=Path, metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
