"""Seeded histories of caches with KV rows on a service whose device is too small for them, against plain tensors.

    python -m tests.support.kv_history 4711            # one history, told step by step
    python -m tests.support.kv_history 4711 --spill    # the same on a host that is too small as well

Keys, KV rows and window rows are appended, rewritten and truncated each by itself, caches forked and deleted; queries
attend given rows and rows that a search finds, alone, in batches that may append first, and in calls that stay open
over the steps of others; workers are killed. A seed says every step and every number. Every answer row is judged in
float64, from the rows that the cache had when the call began.
"""

from __future__ import annotations

import queue
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import streamindex_client
import torch

from streamindex_service.ops.kv_rows import KvFormat, KvRows
from streamindex_service.testing.service import RunningService
from tests.support.attention import Queries, Rows, Shape, joined, part, wrong_rows
from tests.support.cache_history import Kill, killer
from tests.support.calls import Calls
from tests.support.services import MIB, SMALL_DEVICE, small_host, wait_for

# Rows of 128, 584 and 656 bytes
SHAPES = (
    Shape(),
    Shape(kv_format=KvFormat.FP8_D512, key_dim=512, value_dim=512, heads=2),
    Shape(kv_format=KvFormat.FP8_D576, key_dim=576, value_dim=512, heads=2, ratio=1),
)
MOST_CACHES, MOST_BYTES = 6, 10 << 20
MOST_ROW_BYTES = 1 << 20  # of one kind in one cache: three kinds of one cache fit the device
MOST_SEEN = 1000  # by a query that attends all: more, widened in torch, do not fit the device beside the KV rows
STEPS, WINDOW, TOP_K = 70, 60, 24


@dataclass(eq=False)
class Held:
    """A cache of the service and what its rows must be. Rows are never changed in place."""

    number: int
    cache: streamindex_client.KeyCache
    shape: Shape
    rows: Rows

    def most(self, kind: str) -> int:
        """Rows of a kind that it may have."""
        if kind == "keys":
            return 2000
        return MOST_ROW_BYTES // (self.shape.kv_format.packed.row_bytes if self.shape.kv_format.packed else 128)

    @property
    def size_bytes(self) -> int:
        return sum(each.data.nbytes for each in (self.rows.kv, self.rows.window)) + self.rows.keys.nbytes


@dataclass(eq=False)
class OpenCall:
    """A call whose first rows are answered, and what it must see."""

    shape: Shape
    rows: Rows
    queries: Queries
    indices: torch.Tensor
    window: int
    stream: Any
    chunks: queue.Queue[Any] = field(default_factory=queue.Queue)
    out: list[torch.Tensor] = field(default_factory=list)


class KvHistory:
    """One seed's history on a service. `kill` ends the service's worker; `tell` hears of every step."""

    def __init__(
        self,
        client: streamindex_client.Client,
        kill: Kill,
        seed: int,
        tell: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.steps: Counter[str] = Counter()
        self._client = client
        self._kill = kill
        self._tell = tell
        self._random = np.random.default_rng(seed)
        self._made = 0
        self._drawn = 1000 * seed
        self._held: list[Held] = []
        self._open: list[OpenCall] = []

    def run(self) -> None:
        """From nothing to nothing. Raises AssertionError when an answer is not what the rows say."""
        try:
            for shape in SHAPES:
                self._create(shape)
            kills = set(self._random.choice(STEPS, 2, replace=False).tolist())
            for number in range(STEPS):
                name = "kill" if number in kills else self._choose_step()
                self.steps[name] += 1
                getattr(self, f"_do_{name}")()
            while self._open:
                self._end(self._open[0])
            for held in self._held:
                self._attend_given(held)
        finally:
            for call in self._open:
                call.chunks.put(None)
                call.stream.close()
            for held in self._held:
                held.cache.delete()

    def _choose_step(self) -> str:
        if sum(held.size_bytes for held in self._held) > MOST_BYTES:
            return "delete"
        names = {
            "append": 7, "rewrite": 3, "truncate": 2, "fork": 2, "create": 1, "delete": 1, "given": 6, "found": 5,
            "whole": 3, "batch": 3, "open": 2, "end": 2, "kill_call": 0.7,
        }  # fmt: skip
        weights = np.array(list(names.values()))
        return str(self._random.choice(list(names), p=weights / weights.sum()))

    def _say(self, what: str) -> None:
        self._tell(f"{sum(self.steps.values()):3}  {what}")

    def _pick(self) -> Held:
        return self._held[self._below(len(self._held))]

    def _below(self, stop: int) -> int:
        return int(self._random.integers(stop))

    def _seed(self) -> int:
        self._drawn += 1
        return self._drawn

    # Steps that change a cache.

    def _create(self, shape: Shape) -> None:
        self._made += 1
        held = Held(self._made, shape.create(self._client), shape, Rows.drawn(shape, 0, 0))
        self._held.append(held)
        self._say(f"cache {held.number} is made: {shape.kv_format.value}")
        for kind in ("keys", "kv", "window"):
            self._write(held, kind, 0)

    def _do_create(self) -> None:
        if len(self._held) < MOST_CACHES:
            self._create(SHAPES[self._below(len(SHAPES))])

    def _write(self, held: Held, kind: str, first_row: int) -> None:
        most = min(held.most(kind) - first_row, int(self._random.choice([3, 300, 3000, 6000])))
        if most < 1:
            return
        count = most - self._below(1 + most // 2)
        self._say(f"cache {held.number}: {kind} {first_row}..{first_row + count}")
        drawn = Rows.drawn(held.shape, count * held.shape.ratio, self._seed())
        rows = held.rows
        if kind == "keys":
            after = torch.cat([rows.keys[:first_row], drawn.keys, rows.keys[first_row + count :]])
            length = held.cache.append(layer=0, keys=drawn.keys, first_row=first_row)
            held.rows = Rows(after, rows.kv, rows.window)
        else:
            new: KvRows = drawn.kv
            old: KvRows = getattr(rows, kind)
            tail = part(old, slice(first_row + count, None))
            after = joined(joined(part(old, slice(0, first_row)), new), tail)
            name = {"kv": "kv_rows", "window": "window_rows"}[kind]
            length = held.cache.append(layer=0, scales=new.scales, first_row=first_row, **{name: new.data})
            held.rows = Rows(rows.keys, *(after, rows.window) if kind == "kv" else (rows.kv, after))
        assert length == len(after if kind == "keys" else after.data)

    def _kind_of(self, held: Held) -> tuple[str, int]:
        kind = str(self._random.choice(["keys", "kv", "window"]))
        return kind, len(held.rows.keys if kind == "keys" else getattr(held.rows, kind).data)

    def _do_append(self) -> None:
        held = self._pick()
        self._write(held, *self._kind_of(held))
        while not self._complete(held) and self._below(8):
            self._write(held, "kv", held.rows.kv.rows)

    def _complete(self, held: Held) -> bool:
        """Whether what a search finds has a KV row."""
        return len(held.rows.keys) <= held.rows.kv.rows

    def _do_rewrite(self) -> None:
        held = self._pick()
        kind, length = self._kind_of(held)
        self._write(held, kind, self._below(length + 1))

    def _cut(self, held: Held) -> tuple[int, int | None, Rows]:
        """Keys and window rows to keep, and what is left."""
        rows = held.rows
        keys = self._below(max(len(rows.keys), rows.kv.rows) + 1)
        window = self._below(rows.window.rows + 1) if self._random.integers(2) else None
        tokens = (keys + 1) * held.shape.ratio - 1 if window is None else window
        return keys, window, rows.cut(keys, tokens)

    def _do_truncate(self) -> None:
        held = self._pick()
        keys, window, left = self._cut(held)
        self._say(f"cache {held.number}: truncated to {keys} keys and {window} window rows")
        held.cache.truncate(keys, window_rows=window)
        held.rows = left

    def _do_fork(self) -> None:
        if len(self._held) >= MOST_CACHES:
            return
        held = self._pick()
        keys, window, left = (None, None, held.rows) if self._random.integers(2) else self._cut(held)
        self._made += 1
        self._say(f"cache {held.number} is forked as {self._made}, to {keys} keys and {window} window rows")
        self._held.append(Held(self._made, held.cache.fork(keys=keys, window_rows=window), held.shape, left))

    def _do_delete(self) -> None:
        if len(self._held) > 1:
            held = self._pick()
            self._say(f"cache {held.number} is deleted")
            self._held.remove(held)
            held.cache.delete()

    # Steps that look.

    def _queries(self, held: Held, count: int, window: int) -> Queries:
        """At the end of the window rows, or anywhere before it; without a window also beyond."""
        held_rows = held.rows.window.rows if window else held.rows.window.rows + 2 * count
        last = max(0, held_rows - count)
        start = max(0, last - self._below(count)) if self._random.integers(3) else self._below(last + 1)
        return Queries.drawn(held.shape, torch.arange(start, start + count), self._seed())

    def _window(self, count: int, *all_held: Held) -> int:
        """Tokens of the windows of `count` queries, 0 where there are not as many: a window needs its rows."""
        return WINDOW if all(held.rows.window.rows >= count for held in all_held) else 0

    def _given(self, held: Held, count: int) -> torch.Tensor:
        """Indices of KV rows, some of which are not there."""
        drawn = self._random.integers(-2, held.rows.kv.rows + 3, (count, TOP_K))
        return torch.from_numpy(drawn.astype(np.int32))

    def _found(self, held: Held, queries: Queries) -> torch.Tensor:
        """What a search finds."""
        return held.cache.search_all(
            layer=0, q=queries.index_q, w=queries.index_w, top_k=TOP_K, start_position=int(queries.positions[0]),
            order="index",
        ).indices  # fmt: skip

    def _header(self, held: Held, queries: Queries, window: int) -> dict[str, Any]:
        return {
            "layer": 0, "start_position": int(queries.positions[0]), "window": window, "scale": held.shape.scale,
            "want_lse": True,
        }  # fmt: skip

    def _judge(
        self, shape: Shape, rows: Rows, queries: Queries, indices: torch.Tensor, window: int, out: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        assert len(out) == len(queries)
        assert wrong_rows(shape, rows, queries, indices, window, out, lse) == 0, "the answer is not what the rows say"

    def _attend_given(self, held: Held) -> None:
        count = 1 + self._below(20)
        window = self._window(count, held)
        queries = self._queries(held, count, window)
        indices = self._given(held, count)
        self._say(f"cache {held.number}: {count} queries attend given rows of {held.rows.kv.rows}")
        answer = held.cache.sparse_attend_all(q=queries.q, indices=indices, **self._header(held, queries, window))
        self._judge(held.shape, held.rows, queries, indices, window, answer.out, answer.lse)

    def _do_given(self) -> None:
        self._attend_given(self._pick())

    def _do_found(self) -> None:
        held = self._pick()
        count = 1 + self._below(20)
        window = self._window(count, held)
        queries = self._queries(held, count, window)
        self._say(f"cache {held.number}: {count} queries search {len(held.rows.keys)} keys and attend")
        header = self._header(held, queries, window)
        arguments = {"q": queries.q, "index_q": queries.index_q, "index_w": queries.index_w, "top_k": TOP_K, **header}
        if not self._complete(held):
            with pytest.raises(streamindex_client.FailedPreconditionError, match="NO_KV_ROWS"):
                held.cache.sparse_attend_all(**arguments)
            return
        answer = held.cache.sparse_attend_all(**arguments)
        self._judge(held.shape, held.rows, queries, self._found(held, queries), window, answer.out, answer.lse)

    def _do_whole(self) -> None:
        few = [held for held in self._held if held.rows.kv.rows <= MOST_SEEN]
        if not few:
            return
        held = few[self._below(len(few))]
        count = 1 + self._below(20)
        window = self._window(count, held)
        queries = self._queries(held, count, window)
        self._say(f"cache {held.number}: {count} queries attend all that they see of {held.rows.kv.rows} rows")
        arguments = {"q": queries.q, "all_visible": True, **self._header(held, queries, window)}
        seen = (queries.positions + 1) // held.shape.ratio
        if int(seen[-1]) > held.rows.kv.rows:
            with pytest.raises(streamindex_client.FailedPreconditionError, match="NO_KV_ROWS"):
                held.cache.sparse_attend_all(**arguments)
            return
        self.steps["attended whole"] += 1
        answer = held.cache.sparse_attend_all(**arguments)
        row = torch.arange(held.rows.kv.rows)
        indices = torch.where(row < seen[:, None], row, -1).to(torch.int32)
        self._judge(held.shape, held.rows, queries, indices, window, answer.out, answer.lse)

    def _do_batch(self) -> None:
        shape = self._pick().shape
        same = [held for held in self._held if held.shape == shape]
        self._say(f"caches {', '.join(str(held.number) for held in same)} attend in a batch")
        appends = [self._appends(held) for held in same]
        window = self._window(2, *same)
        queries = [self._queries(held, 2, window) for held in same]
        items = [
            streamindex_client.AttendBatchItem(
                held.cache, layer=0, q=rows.q, index_q=rows.index_q, index_w=rows.index_w,
                start_position=int(rows.positions[0]), **new,
            )
            for held, rows, new in zip(same, queries, appends, strict=True)
        ]  # fmt: skip
        results = self._client.sparse_attend_batch(
            items, top_k=TOP_K, window=window, scale=shape.scale, want_indices=True
        )
        for held, rows, result in zip(same, queries, results, strict=True):
            lengths = (result.layer_keys, result.layer_kv_rows, result.layer_window_rows)
            assert lengths == (len(held.rows.keys), held.rows.kv.rows, held.rows.window.rows)
            if not self._complete(held):
                assert result.error is not None
                assert result.error.reason == "NO_KV_ROWS", result.error
                continue
            assert result.error is None, result.error
            wanted = self._found(held, rows)
            assert torch.equal(torch.as_tensor(result.indices).sort(dim=1).values, wanted.sort(dim=1).values)
            self._judge(shape, held.rows, rows, wanted, window, torch.as_tensor(result.out))

    def _appends(self, held: Held) -> dict[str, Any]:
        """New rows of a cache that an item of a batch brings, of some kinds or of none; they count from now on."""
        rows, items, found = held.rows, dict[str, Any](), list[str]()
        drawn = Rows.drawn(held.shape, (1 + self._below(5)) * held.shape.ratio, self._seed())
        if self._below(2) and len(rows.keys) + len(drawn.keys) <= held.most("keys"):
            items |= {"keys": drawn.keys, "first_key": len(rows.keys)}
            rows = Rows(torch.cat([rows.keys, drawn.keys]), rows.kv, rows.window)
            found.append("keys")
        for kind in ("kv", "window"):
            old: KvRows = getattr(rows, kind)
            if self._below(2) and old.rows + drawn.kv.rows <= held.most(kind):
                new = drawn.kv
                items |= {f"{kind}_rows": new.data, f"{kind}_scales": new.scales, f"first_{kind}_row": old.rows}
                after = joined(old, new)
                rows = Rows(rows.keys, *(after, rows.window) if kind == "kv" else (rows.kv, after))
                found.append(kind)
        if found:
            self._say(f"  cache {held.number} appends {' and '.join(found)} there")
        held.rows = rows
        return items

    def _do_open(self) -> None:
        held = self._pick()
        if not self._complete(held):
            return
        window = self._window(6, held)
        queries = self._queries(held, 6, window)
        self._say(f"cache {held.number}: a call begins, and stays open")
        chunks: queue.Queue[Any] = queue.Queue()
        stream = held.cache.sparse_attend(
            q=iter(chunks.get, None), top_k=TOP_K, **self._header(held, queries, window) | {"want_lse": False}
        )
        call = OpenCall(held.shape, held.rows, queries, self._found(held, queries), window, stream, chunks)
        self._open.append(call)
        self._send(call, slice(0, 3))
        call.out.append(torch.as_tensor(next(stream).out))

    def _send(self, call: OpenCall, which: slice) -> None:
        queries = call.queries
        call.chunks.put((queries.q[which], queries.index_q[which], queries.index_w[which]))

    def _do_end(self) -> None:
        if self._open:
            self._end(self._open[self._below(len(self._open))])

    def _end(self, call: OpenCall) -> None:
        self._say("an open call goes on to its end")
        self._send(call, slice(3, 6))
        call.chunks.put(None)
        call.out += [torch.as_tensor(each.out) for each in call.stream]
        self._open.remove(call)
        self._judge(call.shape, call.rows, call.queries, call.indices, call.window, torch.cat(call.out))

    # Steps that end the worker.

    def _do_kill(self) -> None:
        self._say("the worker is killed")
        wait_for(self._kill())

    def _do_kill_call(self) -> None:
        """The worker is killed under a call, which the client repeats from where it was."""
        held = self._pick()
        window = self._window(12, held)
        queries = self._queries(held, 12, window)
        indices = self._given(held, len(queries))
        self._say(f"cache {held.number}: the worker is killed under a call")
        known: list[Callable[[], bool]] = []

        def chunks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for first in range(0, len(queries), 3):
                if first == 6:
                    known.append(self._kill())
                yield queries.q[first : first + 3], indices[first : first + 3]

        header = self._header(held, queries, window)
        answer = held.cache.sparse_attend_all(q=chunks(), indices=TOP_K, **header)
        wait_for(known[0])
        self._judge(held.shape, held.rows, queries, indices, window, answer.out, answer.lse)


def settings_of(spill_dir: Any) -> dict[str, dict[str, Any]]:
    """A service whose device is too small; with a directory its host is, too."""
    if spill_dir is None:
        return SMALL_DEVICE
    settings = small_host(spill_dir)
    return {**settings, "memory": {**settings["memory"], "host_budget_bytes": 10 * MIB}}


def main(arguments: list[str]) -> None:
    """One history, told."""
    directory = tempfile.gettempdir() if "--spill" in arguments else None
    with (
        RunningService(settings_of(directory)) as service,
        streamindex_client.connect(service.address) as client,
        Calls(service.address) as calls,
    ):
        KvHistory(client, killer(service), int(arguments[0]), tell=print).run()
        print(calls.load())


if __name__ == "__main__":
    main(sys.argv[1:])
