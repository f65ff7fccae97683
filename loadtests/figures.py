"""The pictures of reports. Needs matplotlib (the extra `bench`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.rcParams.update(
    {
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "font.size": 9,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
)


def run_figure(summary: Mapping[str, Any]) -> Figure:
    """Throughput, latency percentiles, budgets, and the queue over the time of a run."""
    figure = Figure(figsize=(11, 12), dpi=110, layout="constrained")
    throughput, latency, budget, queue = figure.subplots(4, 1, sharex=True)
    _throughput(throughput, summary["series"])
    _latency(latency, summary["series"])
    _budgets(budget, summary["load"])
    _queue(queue, summary["load"])
    queue.set_xlabel("seconds")
    figure.suptitle(f"Profile {summary['profile']}, device {summary['header']['device']}, {summary['seconds']} s")
    return figure


def sweep_figure(sweep: Mapping[str, Any]) -> Figure:
    """Offered load against latency and refusals; the knee is the last load that the service bore."""
    steps = sweep["steps"]
    offered = [step["offered_per_s"] for step in steps]
    figure = Figure(figsize=(9, 7), dpi=110, layout="constrained")
    latency, outcome = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for rank, style in ((50, "o-"), (99, "s--")):
        latency.plot(offered, [step[f"p{rank}_ms"] for step in steps], style, label=f"p{rank}")
    latency.axhline(sweep["p99_limit_ms"], color="0.6", linewidth=1, label="limit of p99")
    latency.set(yscale="log", ylabel="ms", title="from when a call should have begun")
    outcome.plot(offered, [100 * step["refused_share"] for step in steps], "o-", label="refused")
    outcome.plot(offered, [100 * step["failed_share"] for step in steps], "x-", label="late or failed")
    outcome.set(xscale="log", xlabel="offered calls a second", ylabel="% of calls", ylim=(-2, 102))
    outcome.set_xticks(offered, [f"{each:.0f}" for each in offered])
    outcome.set_xticks([], minor=True)
    for axes in (latency, outcome):
        if sweep["knee_per_s"] is not None:
            axes.axvline(sweep["knee_per_s"], color="tab:red", linewidth=1, label=f"knee: {sweep['knee_per_s']:.0f}/s")
        _legend(axes)
    figure.suptitle(f"Offered load on {sweep['header']['device']}, profile {sweep['profile']}")
    return figure


def _throughput(axes: Axes, series: Mapping[str, Any]) -> None:
    axes.plot(series["seconds"], series["calls_per_s"], label="calls/s")
    axes.plot(series["seconds"], series["refused_per_s"], label="refused/s")
    axes.plot(series["seconds"], series["failed_per_s"], label="failed/s", color="tab:red")
    axes.set(ylabel="calls a second", ylim=(0, None), title="Throughput")
    tensors = axes.twinx()
    tensors.grid(visible=False)
    tensors.plot(series["seconds"], series["mb_per_s"], color="0.6", label="MB/s")
    tensors.set(ylabel="MB/s of tensors", ylim=(0, None))
    _legend(axes, tensors)


def _latency(axes: Axes, series: Mapping[str, Any]) -> None:
    for number, (scenario, ranks) in enumerate(series["latency"].items()):
        color = f"C{number}"
        # a bin without an answered call has no latency
        points = {
            rank: [pair for pair in zip(series["seconds"], values, strict=True) if pair[1] is not None]
            for rank, values in ranks.items()
        }
        axes.plot(*zip(*points["p50_ms"], strict=True), color=color, label=scenario)
        axes.plot(*zip(*points["p99_ms"], strict=True), color=color, linestyle=":", linewidth=1)
    axes.set(yscale="log", ylabel="ms of the main call", title="p50, and p99 dotted")
    _legend(axes)


def _budgets(axes: Axes, load: Mapping[str, Any]) -> None:
    for name, ledger in load["ledgers"].items():
        limit = ledger["limit_bytes"]
        axes.plot(
            load["seconds"],
            [100 * reserved / limit for reserved in ledger["reserved_bytes"]],
            label=f"{name}, of {limit / (1 << 20):,.0f} MiB",
        )
    axes.plot(
        load["seconds"],
        [100 * share for share in load["device_busy_share"]],
        color="0.7",
        linewidth=1,
        label="device busy",
    )
    axes.set(ylabel="% of the budget", ylim=(0, 105), title="Budgets: bytes reserved")
    _legend(axes)


def _queue(axes: Axes, load: Mapping[str, Any]) -> None:
    axes.plot(load["seconds"], load["queued_tiles"], label="tiles waiting")
    axes.plot(load["seconds"], load["running_searches"], label="searches running")
    axes.set(ylabel="count", ylim=(0, None), title="Queue")
    work = axes.twinx()
    work.grid(visible=False)
    work.plot(load["seconds"], load["queued_s"], color="0.6", label="device seconds waiting")
    work.set(ylabel="seconds", ylim=(0, None))
    _legend(axes, work)


def _legend(axes: Axes, *twins: Axes) -> None:
    """One legend for axes that share their frame, above them at the right, where no curve is."""
    handles: list[Any] = []
    labels: list[str] = []
    for each in (axes, *twins):
        for held, more in zip((handles, labels), each.get_legend_handles_labels(), strict=True):
            held.extend(more)
    axes.legend(handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, ncols=len(labels))
