"""`streamindex top`: the load of a service as it changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from streamindex.v1 import server_pb2 as pb
from streamindex.v1 import types_pb2

_MIB = 1 << 20
_BAR_WIDTH = 30


def watch(loads: Iterable[pb.GetLoadResponse], console: Console, title: str) -> None:
    """Show each of the loads in the place of the one before, until there are no more."""
    with Live(console=console, auto_refresh=False, screen=False) as live:
        for view in views(loads, title):
            live.update(view, refresh=True)


def views(loads: Iterable[pb.GetLoadResponse], title: str) -> Iterator[RenderableType]:
    """A picture of each load; how busy the device is comes from two of them."""
    before: pb.GetLoadResponse | None = None
    for load in loads:
        yield picture(load, before, title)
        before = load


def picture(load: pb.GetLoadResponse, before: pb.GetLoadResponse | None, title: str) -> RenderableType:
    """One moment: the service, its budgets, where caches lie, the device, the queue by priority and by caller."""
    return Group(
        _headline(load, title), _budgets(load), _caches(load), _device(load, before), _bands(load), _callers(load)
    )


def busy_share(load: pb.GetLoadResponse, before: pb.GetLoadResponse | None) -> float:
    """How much of the time between two loads the device worked, from 0 to 1; since the start when there is one."""
    then_us, then_ms = (before.device.busy_us, before.uptime_ms) if before is not None else (0, 0)
    passed_us = 1000 * (load.uptime_ms - then_ms)
    return min(1.0, max(0.0, (load.device.busy_us - then_us) / passed_us)) if passed_us > 0 else 0.0


def _headline(load: pb.GetLoadResponse, title: str) -> Text:
    state = ("ready", "bold green") if load.ready else ("not ready", "bold red")
    return Text.assemble(
        (title, "bold"),
        "  ",
        state,
        f"  up {load.uptime_ms / 1000:,.0f} s  {load.worker_restarts} worker restarts  "
        f"{load.key_caches:,} caches  {load.open_uploads:,} uploads  "
        f"searches: {load.running_searches:,} running, {load.queued_searches:,} waiting",
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _budgets(load: pb.GetLoadResponse) -> Table:
    table = _table("budget", "", "reserved MiB", "peak MiB", "limit MiB")
    for ledger in load.ledgers:
        bar = ProgressBar(total=max(1, ledger.limit_bytes), completed=ledger.reserved_bytes, width=_BAR_WIDTH)
        sizes = (ledger.reserved_bytes, ledger.peak_bytes, ledger.limit_bytes)
        table.add_row(ledger.name, bar, *(f"{size / _MIB:,.1f}" for size in sizes))
    return table


def _caches(load: pb.GetLoadResponse) -> Table:
    found = load.residency
    table = _table("caches with rows", "")
    table.add_row(
        "on the device wholly · partly · not at all", f"{found.device:,} · {found.partial:,} · {found.none:,}"
    )
    table.add_row("wholly or partly on disk", f"{found.spilled:,}")
    return table


def _device(load: pb.GetLoadResponse, before: pb.GetLoadResponse | None) -> Table:
    device, share = load.device, busy_share(load, before)
    table = _table("device", "")
    table.add_row("busy", f"{share:.0%}")
    table.add_row("tiles there · done", f"{device.tiles:,} · {device.tiles_done:,}")
    table.add_row("keys there", f"{device.resident_bytes / _MIB:,.1f} MiB")
    pages = (device.promoted_pages, device.evicted_pages, device.moved_pages)
    table.add_row("pages brought · evicted · moved", " · ".join(f"{each:,}" for each in pages))
    for name, latency in (("a tile waits p50 · p99", device.wait), ("a tile runs p50 · p99", device.run)):
        table.add_row(name, f"{latency.p50_us / 1000:,.2f} · {latency.p99_us / 1000:,.2f} ms")
    memory = device.memory
    ratios = f"{memory.last_ratio:.3f} · {memory.least_ratio:.3f} to {memory.most_ratio:.3f} of {memory.large_tiles:,}"
    table.add_row("memory to estimate last · all large tiles", ratios if memory.large_tiles else "not measured")
    table.add_row("tiles without memory", f"{memory.failures:,}")
    return table


def _bands(load: pb.GetLoadResponse) -> Table:
    table = _table("priority", "tiles waiting", "waits p50 · p99 ms")
    for band in load.queue.bands:
        name = types_pb2.Priority.Name(band.priority).removeprefix("PRIORITY_").lower()
        table.add_row(name, f"{band.tiles:,}", f"{band.wait.p50_us / 1000:,.2f} · {band.wait.p99_us / 1000:,.2f}")
    return table


def _callers(load: pb.GetLoadResponse) -> Table:
    table = _table("caller", "tiles waiting", "about ms of work")
    for caller in load.queue.callers:
        table.add_row(Text(caller.caller), f"{caller.tiles:,}", f"{caller.estimated_us / 1000:,.1f}")
    return table
