"""Pictures of result files; the only part of the benchmarks that needs matplotlib."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tables import JsonRow

# the same rows give the same file
matplotlib.rcParams["svg.hashsalt"] = "benchmarks"
matplotlib.rcParams["svg.fonttype"] = "none"
SVG_METADATA = {"Date": None, "Creator": None}

_COLORS = {("triton", "fp8_e4m3"): "tab:green", ("triton", "bf16"): "tab:blue", ("chunked", "bf16"): "tab:orange"}
_OTHER_COLOR = "tab:gray"
_MARKERS = {"bf16": "o", "fp8_e4m3": "s"}
_DEFAULT_WORKSPACE = 256 << 20
_LINES = {256 << 20: "-", 64 << 20: "--", 16 << 20: ":"}
_BAR_INCHES = 0.28
Pictures = dict[str, Figure]


def pictures(table: str, result: dict[str, Any]) -> Pictures:
    """Name of a picture -> picture, of one result file."""
    rows = result["rows"]
    draw = _DRAWN.get(table)
    # a file of an older form has no fields to draw from
    if draw is not None and all("model" in row for row in rows):
        return draw(table, result["header"], rows)
    return _bars(table, result["header"], rows)


def _scaling(table: str, header: JsonRow, rows: Sequence[JsonRow]) -> Pictures:
    """Seconds, and bytes beyond inputs and outputs, against tokens, log-log; one picture a model."""
    drawn: Pictures = {}
    for model, of_model in _grouped(rows, lambda row: row["model"]):
        figure = Figure(figsize=(11, 5), layout="constrained")
        time, memory = figure.subplots(1, 2)
        for (name, dtype, workspace), points in _grouped(of_model, _series):
            color = _COLORS.get((name, dtype), _OTHER_COLOR)
            style = {
                "label": _label(name, dtype, workspace),
                "color": color,
                "marker": _MARKERS.get(dtype, "x"),
                "linestyle": _LINES.get(workspace, "-"),
            }
            done = [row for row in points if row["seconds"] is not None]
            tokens = [row["tokens"] for row in done]
            time.plot(tokens, [row["seconds"] for row in done], **style)
            memory.plot(tokens, [max(row["peak_bytes"], 1) / 2**20 for row in done], **style)
            _mark_missing(time, memory, points, done, color)
        _roofs(time, header, of_model)
        _log_log(time, "seconds")
        _log_log(memory, "MiB beyond inputs and outputs")
        time.legend(fontsize="small")
        figure.suptitle(f"{model}: exact top-k of a whole prefill, {header['device']}")
        drawn[f"{table}-{model}"] = figure
    return drawn


def _series(row: JsonRow) -> tuple[str, str, int]:
    return row["implementation"], row["dtype"], row["workspace_bytes"] or _DEFAULT_WORKSPACE


def _label(name: str, dtype: str, workspace: int) -> str:
    return f"{name} {dtype}" + (f", {workspace >> 20} MiB" if workspace != _DEFAULT_WORKSPACE else "")


def _mark_missing(time: Axes, memory: Axes, points: Sequence[JsonRow], done: Sequence[JsonRow], color: str) -> None:
    """A cross at the first length that an implementation could not do."""
    missing = sorted(row["tokens"] for row in points if row["seconds"] is None)
    if not missing:
        return
    for axes, key, unit in ((time, "seconds", 1.0), (memory, "peak_bytes", 2**20)):
        height = max((row[key] / unit for row in done), default=1.0)
        axes.plot([missing[0]], [height], marker="X", markersize=10, color=color, linestyle="")
        axes.annotate("out of memory", (missing[0], height), textcoords="offset points", xytext=(8, 4), fontsize=8)


def _roofs(axes: Axes, header: JsonRow, rows: Sequence[JsonRow]) -> None:
    """The time that the useful work takes at the roof, a line for each element type."""
    for dtype, of_dtype in _grouped([row for row in rows if row["roof_fraction"]], lambda row: row["dtype"]):
        if roof := header.get(f"roof_tflops_{dtype}"):
            at_roof = {row["tokens"]: row["seconds"] * row["useful_tflops"] / float(roof) for row in of_dtype}
            tokens = sorted(at_roof)
            label = f"roof {dtype}, {float(roof):.0f} TFLOP/s"
            axes.plot(tokens, [at_roof[each] for each in tokens], color="black", linewidth=0.8, alpha=0.6,
                      linestyle=_LINES[16 << 20] if dtype == "fp8_e4m3" else "-", label=label)  # fmt: skip


def _log_log(axes: Axes, what: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(
        lambda tokens, _: f"{tokens / 1024:g}K" if tokens < 1 << 20 else f"{tokens / 2**20:g}M"
    )
    axes.set_xlabel("tokens")
    axes.set_ylabel(what)
    axes.grid(visible=True, which="major", alpha=0.3)


def _short(tokens: float) -> str:
    return f"{tokens / 1024:g}K" if tokens < 1 << 20 else f"{tokens / 2**20:g}M"


def _design(table: str, header: JsonRow, rows: Sequence[JsonRow]) -> Pictures:
    """Query chunk × key tile, coloured by seconds; one picture for each implementation and element type, a square for
    each top_k."""
    drawn: Pictures = {}
    tiled = [row for row in rows if row["seconds"] is not None and "chunk" in row["note"]]
    for (name, dtype), of_kind in _grouped(tiled, lambda row: (row["implementation"], row["dtype"])):
        top_ks = _grouped(of_kind, lambda row: row["top_k"])
        figure = Figure(figsize=(4 * len(top_ks), 3.6), layout="constrained")
        for axes, (top_k, cells) in zip(figure.subplots(1, len(top_ks), squeeze=False)[0], top_ks, strict=True):
            _heat(axes, cells)
            axes.set_title(f"top_k {top_k}")
        figure.suptitle(f"{name} {dtype}, {of_kind[0]['tokens']} tokens: ms, recall ({header['device']})")
        drawn[f"{table}-{name}-{dtype}"] = figure
    return drawn


def _heat(axes: Axes, rows: Sequence[JsonRow]) -> None:
    chunks = sorted({row["query_chunk"] for row in rows})
    tiles = sorted({row["key_tile"] for row in rows})
    grid = [[float("nan")] * len(tiles) for _ in chunks]
    for row in rows:
        x, y = tiles.index(row["key_tile"]), chunks.index(row["query_chunk"])
        grid[y][x] = row["seconds"] * 1e3
        axes.text(x, y, f"{row['seconds'] * 1e3:.3g}\n{row['recall']:.3f}", ha="center", va="center", fontsize=8)
    axes.imshow(grid, cmap="viridis_r", alpha=0.6, aspect="auto")
    axes.set_xticks(range(len(tiles)), [str(tile) for tile in tiles])
    axes.set_yticks(range(len(chunks)), [str(chunk) for chunk in chunks])
    axes.set_xlabel("key tile")
    axes.set_ylabel("query chunk")


def _ablations(table: str, header: JsonRow, rows: Sequence[JsonRow]) -> Pictures:
    """Time against the whole algorithm, and recall, of every ablation; one picture for each length."""
    drawn: Pictures = {}
    for (tokens, dtype), part in _grouped(rows, lambda row: (row["tokens"], row["dtype"])):
        shown = [row for row in part if row["seconds"] is not None]
        figure = Figure(figsize=(11, 1.5 + _BAR_INCHES * len(shown)), layout="constrained")
        time, recall = figure.subplots(1, 2, sharey=True)
        names = [f"{row['implementation']}, {_without(row)}" for row in shown]
        # what is faster than the whole has a ratio above 1; drawn is the time it takes
        times = [1.0 if row["ratio"] is None else 1 / row["ratio"] for row in shown]
        for axes, values, what, form in (
            (time, times, "time, of the whole algorithm's", "%.3g"),
            (recall, [row["recall"] for row in shown], "recall", "%.4f"),
        ):
            axes.bar_label(axes.barh(range(len(shown)), values), fmt=form, fontsize=8)
            axes.set_xlabel(what)
            axes.set_yticks(range(len(shown)), names)
        time.invert_yaxis()
        figure.suptitle(f"{dtype}, {tokens} tokens, {header['device']}")
        drawn[f"{table}-{dtype}-{tokens}"] = figure
    return drawn


def _without(row: JsonRow) -> str:
    if not row["left_out"]:
        return "whole"
    return f"no {row['left_out']}" + (f" ({row['note']})" if not row["exact"] else "")


def _profile(table: str, header: JsonRow, rows: Sequence[JsonRow]) -> Pictures:
    """The kernels of each chunk, stacked."""
    parts = [row for row in rows if row["part"] != "chunk"]
    chunks = _grouped(parts, lambda row: (row["case"].rsplit(",", 1)[0], row["dtype"]))
    figure = Figure(figsize=(10, 1.5 + _BAR_INCHES * len(chunks)), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["part"] for row in parts))
    left = [0.0] * len(chunks)
    for name in names:
        widths = [sum(row["seconds"] for row in chunk if row["part"] == name) * 1e3 for _, chunk in chunks]
        axes.barh(range(len(chunks)), widths, left=left, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(chunks)), [f"{case} {dtype}" for (case, dtype), _ in chunks])
    axes.invert_yaxis()
    axes.set_xlabel("ms of the last chunk")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title(f"where the time goes, {header['device']}")
    return {table: figure}


def _bars(table: str, header: JsonRow, rows: Sequence[JsonRow]) -> Pictures:
    """Seconds of every row."""
    timed = [row for row in rows if row["seconds"]]
    if not timed:
        return {}
    figure = Figure(figsize=(10, 1.5 + _BAR_INCHES * len(timed)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(timed)), [row["seconds"] for row in timed])
    axes.bar_label(bars, labels=[f"{row['seconds']:.3g} s" for row in timed], fontsize=8)
    axes.set_yticks(range(len(timed)), [f"{row['case']} {row['dtype']}" for row in timed], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.set_title(f"{table}, {header['device']}")
    return {table: figure}


def _grouped(rows: Iterable[JsonRow], key: Callable[[JsonRow], Any]) -> list[tuple[Any, list[JsonRow]]]:
    """Rows by key, keys in the order in which they first occur."""
    groups: dict[Any, list[JsonRow]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return list(groups.items())


_DRAWN: dict[str, Callable[[str, JsonRow, Sequence[JsonRow]], Pictures]] = {
    "topk_scaling": _scaling,
    "topk_design": _design,
    "topk_ablations": _ablations,
    "topk_profile": _profile,
}
