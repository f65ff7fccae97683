"""Seeded histories of key caches on a running service whose device is too small for them, against plain arrays.

    python -m tests.support.cache_history 4711            # one history, told step by step
    python -m tests.support.cache_history 4711 --spill    # the same on a host that is too small as well

Searches, appends, rewrites, truncations, forks and deletions, uploads that break off, searches that stay open over the
steps of others, and workers killed with and without work. The device holds 3 MiB of pages and some layers have more: an
eviction is nothing to ask for here. A seed says every step and every number. Answers are compared bit for bit.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from streamindex.v1 import search_pb2

from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls, StreamCall, answers, batch_item, finish_message, key_chunks, query_chunk
from tests.support.services import MIB, SMALL_DEVICE, small_host, wait_for
from tests.support.tensors import BF16, FP8, FP32, Draw, Keys, Kind, ModelCache, Queries, expected

# Pages of 256, 64 and 17 KiB: they share the device, and no extent.
KINDS = (
    Kind(heads=2, head_dim=256, key_format=FP32),
    Kind(heads=2, head_dim=128, key_format=BF16, layers=2),
    Kind(heads=2, head_dim=64, key_format=FP8, ratio=4),
)
MOST_KEYS = 3900  # of a layer, so that one answer ranks them all
MOST_CACHES = 6
MOST_BYTES = 14 * MIB  # of all models, counted without sharing
STEPS = 90
TOP_K_LIMIT = 4096

Kill = Callable[[], Callable[[], bool]]
"""Ends the worker; what it gives tells whether the service knows of it. Until then a search may still be given to the
dead one, and end with WORKER_LOST."""


@dataclass(eq=False)
class Pair:
    """A cache of the service and its model."""

    number: int
    cache_id: str
    model: ModelCache

    @property
    def kind(self) -> Kind:
        return self.model.kind

    @property
    def size_bytes(self) -> int:
        return sum(len(rows) for rows in self.model.layers) * (self.kind.row_bytes + 4)


@dataclass(eq=False)
class OpenSearch:
    """A search whose first rows are answered; the others go to it later, and see the layer as it was."""

    call: StreamCall
    kind: Kind
    keys: Keys
    queries: Queries
    top_k: int
    chunks: list[Any]


@dataclass(eq=False)
class BrokenUpload:
    """An upload whose first rows are acknowledged and whose stream is gone."""

    upload_id: str
    pair: Pair
    layer: int
    first_row: int
    rows: Keys
    held: int


class CacheHistory:
    """One seed's history on a service. `kill` ends the service's worker; `tell` hears of every step."""

    def __init__(
        self,
        calls: Calls,
        kill: Kill,
        seed: int,
        tell: Callable[[str], object] = lambda line: None,
        steps: int = STEPS,
    ) -> None:
        self.steps: Counter[str] = Counter()
        self._calls = calls
        self._kill = kill
        self._seed = seed
        self._tell = tell
        self._length = steps
        self._random = np.random.default_rng(seed)
        self._draw = Draw(seed)
        self._made = 0
        self._searches = 0
        self._pairs: list[Pair] = []
        self._open: list[OpenSearch] = []
        self._broken: list[BrokenUpload] = []

    def run(self) -> None:
        """From nothing to nothing. Raises AssertionError when an answer is not the model's."""
        try:
            for kind in KINDS:
                self._create(kind)
            kills = set(self._random.choice(self._length, 2, replace=False).tolist())
            for number in range(self._length):
                self._step("kill" if number in kills else self._choose_step())
            for search in list(self._open):
                self._end_search(search)
            for pair in self._pairs:
                for layer in range(pair.kind.layers):
                    self._check(pair, layer)
        finally:
            self._give_back()

    def _give_back(self) -> None:
        for search in self._open:
            search.call.cancel()
        for pair in self._pairs:
            self._calls.delete(pair.cache_id)

    def _choose_step(self) -> str:
        if sum(pair.size_bytes for pair in self._pairs) > MOST_BYTES:
            return "delete"
        names = {
            "append": 6, "rewrite": 3, "truncate": 2, "fork": 2, "create": 2, "delete": 1, "search": 9,
            "open_search": 2, "end_search": 2, "break_upload": 2, "end_upload": 2, "batch": 3, "kill_search": 0.7,
        }  # fmt: skip
        weights = np.array(list(names.values()))
        return str(self._random.choice(list(names), p=weights / weights.sum()))

    def _step(self, name: str) -> None:
        self.steps[name] += 1
        getattr(self, f"_do_{name}")()

    def _say(self, what: str) -> None:
        self._tell(f"{sum(self.steps.values()):3}  {what}")

    def _pick(self) -> tuple[Pair, int]:
        pair = self._pairs[int(self._random.integers(len(self._pairs)))]
        return pair, int(self._random.integers(pair.kind.layers))

    def _keys_for(self, pair: Pair, first_row: int) -> Keys:
        most = min(MOST_KEYS - first_row, int(self._random.choice([3, 300, 3000, 3900])))
        return self._draw.keys(pair.kind, int(self._random.integers(1 + most // 2, most + 1)))

    # Steps that change a cache.

    def _create(self, kind: Kind) -> None:
        self._made += 1
        pair = Pair(self._made, self._calls.create(kind).id, ModelCache(kind))
        self._pairs.append(pair)
        self._say(f"cache {pair.number} is made: head_dim {kind.head_dim}, format {kind.key_format}")
        self._write(pair, 0, 0)

    def _do_create(self) -> None:
        if len(self._pairs) < MOST_CACHES:
            self._create(KINDS[int(self._random.integers(len(KINDS)))])

    def _write(self, pair: Pair, layer: int, first_row: int) -> None:
        if first_row >= MOST_KEYS:
            return
        rows = self._keys_for(pair, first_row)
        chunk_rows = int(self._random.integers(100, 900))
        self._say(f"cache {pair.number} layer {layer}: rows {first_row}..{first_row + len(rows)}")
        pair.model.write(layer, first_row, rows)
        held = self._calls.upload(pair.kind, pair.cache_id, rows, first_row, layer, chunk_rows)
        assert held == len(pair.model.layers[layer])

    def _do_append(self) -> None:
        pair, layer = self._pick()
        self._write(pair, layer, len(pair.model.layers[layer]))

    def _do_rewrite(self) -> None:
        pair, layer = self._pick()
        self._write(pair, layer, int(self._random.integers(len(pair.model.layers[layer]) + 1)))

    def _do_truncate(self) -> None:
        pair, layer = self._pick()
        length = len(pair.model.layers[layer])
        keys = int(self._random.integers(length // 2, length + 1))
        every = bool(self._random.integers(2))
        self._say(f"cache {pair.number} layer {'all' if every else layer}: truncated to {keys}")
        pair.model.truncate(keys, None if every else layer)
        left = self._calls.truncate(pair.cache_id, keys, None if every else layer).layer_keys
        assert list(left) == [len(rows) for rows in pair.model.layers]

    def _do_fork(self) -> None:
        pair, layer = self._pick()
        if len(self._pairs) >= MOST_CACHES:
            return
        keys = int(self._random.integers(len(pair.model.layers[layer]) + 1)) if self._random.integers(2) else None
        self._made += 1
        self._say(f"cache {pair.number} is forked as {self._made}, to {keys} keys")
        twin = self._calls.fork(pair.cache_id, keys)
        self._pairs.append(Pair(self._made, twin.id, pair.model.fork(keys)))

    def _do_delete(self) -> None:
        if len(self._pairs) == 1:
            return
        pair, _ = self._pick()
        self._say(f"cache {pair.number} is deleted")
        self._pairs.remove(pair)
        self._broken = [upload for upload in self._broken if upload.pair is not pair]
        self._calls.delete(pair.cache_id)

    def _do_break_upload(self) -> None:
        pair, layer = self._pick()
        first_row = len(pair.model.layers[layer])
        if first_row + 2 > MOST_KEYS or self._broken:
            return
        rows = self._draw.keys(pair.kind, int(self._random.integers(2, min(900, MOST_KEYS - first_row) + 1)))
        half = len(rows) // 2
        self._say(f"cache {pair.number} layer {layer}: an upload from {first_row} breaks off after {half} rows")
        call, accepted = self._calls.start_upload(pair.cache_id, len(rows), first_row, layer)
        with call:
            call.send(*key_chunks(pair.kind, rows[:half], 200))
            call.half_close()
            call.rest()
        self._broken.append(BrokenUpload(accepted.upload_id, pair, layer, first_row, rows, half))

    def _do_end_upload(self) -> None:
        if not self._broken:
            return
        upload = self._broken.pop()
        pair, rows = upload.pair, upload.rows
        self._say(f"cache {pair.number} layer {upload.layer}: the upload from {upload.first_row} goes on")
        call, accepted = self._calls.resume_upload(upload.upload_id)
        with call:
            assert accepted.row_offset == upload.held
            call.send(*key_chunks(pair.kind, rows, 200, first=upload.held), finish_message(pair.kind, rows))
            messages, error = call.to_the_end()
        if upload.first_row > len(pair.model.layers[upload.layer]):
            assert messages[-1].refused.reason == "LAYER_CHANGED"
            return
        assert error is None, error
        pair.model.write(upload.layer, upload.first_row, rows)
        assert messages[-1].committed.layer_keys == len(pair.model.layers[upload.layer])

    # Steps that look.

    def _queries(self, pair: Pair, layer: int, rows: int) -> Queries:
        """The last of them sees every key."""
        last = pair.kind.ratio * (len(pair.model.layers[layer]) + 1)
        return self._draw.queries(pair.kind, rows, start_position=max(0, last - rows))

    def _header(self, pair: Pair, layer: int, queries: Queries) -> tuple[int, dict[str, Any]]:
        # A key of its own: two kills may meet searches that have the same header, and none of them is to blame.
        self._searches += 1
        key = f"{self._seed}-{self._searches}"
        top_k = max(1, min(TOP_K_LIMIT, len(pair.model.layers[layer])))
        return top_k, {
            "layer": layer, "start_position": int(queries.positions[0]), "want_scores": True, "request_key": key,
        }  # fmt: skip

    def _check(self, pair: Pair, layer: int) -> None:
        """Rank all keys of a layer: every key's place and score is seen."""
        queries = self._queries(pair, layer, 2)
        top_k, header = self._header(pair, layer, queries)
        self._say(f"cache {pair.number} layer {layer}: {len(pair.model.layers[layer])} keys are ranked")
        found = self._calls.search(pair.kind, pair.cache_id, queries, top_k, **header)
        self._compare(pair.kind, pair.model.layers[layer], queries, top_k, found)

    def _compare(self, kind: Kind, keys: Keys, queries: Queries, top_k: int, found: Any) -> None:
        wanted = expected(kind, keys, queries, top_k)
        for name, one, other in zip(("indices", "scores"), found, wanted, strict=True):
            assert np.array_equal(one, other), f"{name} are not the model's"

    def _do_search(self) -> None:
        self._check(*self._pick())

    def _do_batch(self) -> None:
        """A row for several caches at once, after a few keys are appended to one of them."""
        pair, layer = self._pick()
        first_row = len(pair.model.layers[layer])
        kind = pair.kind
        same = [(other, 0) for other in self._pairs if other.kind == kind and other is not pair]
        append = None
        if first_row + 4 <= MOST_KEYS:
            append = (first_row, self._draw.keys(kind, 4))
            pair.model.write(layer, *append)
        self._say(f"cache {pair.number} layer {layer}: a batch appends at {first_row} and searches {1 + len(same)}")
        targets = [(pair, layer), *same]
        queries = [self._queries(other, index, 1) for other, index in targets]
        items = [
            batch_item(kind, other.cache_id, rows, append if other is pair else None, layer=index)
            for (other, index), rows in zip(targets, queries, strict=True)
        ]
        top_k = max(1, min(TOP_K_LIMIT, max(len(other.model.layers[index]) for other, index in targets)))
        request = search_pb2.SearchBatchRequest(items=items, top_k=top_k, want_scores=True)
        results = self._calls.searches.SearchBatch(request, timeout=60).results
        for (other, index), rows, result in zip(targets, queries, results, strict=True):
            assert not result.HasField("error"), result.error
            found = (
                np.frombuffer(result.indices, np.int32).reshape(1, top_k),
                np.frombuffer(result.scores, np.float32).reshape(1, top_k),
            )
            self._compare(kind, other.model.layers[index], rows, top_k, found)

    def _do_open_search(self) -> None:
        pair, layer = self._pick()
        queries = self._queries(pair, layer, 4)
        top_k, header = self._header(pair, layer, queries)
        self._say(f"cache {pair.number} layer {layer}: a search begins, and stays open")
        call = self._calls.start_search(pair.kind, pair.cache_id, top_k, **header)
        call.send(query_chunk(pair.kind, queries, 0, 2))
        first = call.receive("chunk")
        self._open.append(OpenSearch(call, pair.kind, pair.model.layers[layer], queries, top_k, [first]))

    def _do_end_search(self) -> None:
        if self._open:
            self._end_search(self._open[int(self._random.integers(len(self._open)))])

    def _end_search(self, search: OpenSearch) -> None:
        self._say("an open search goes on to its end")
        self._open.remove(search)
        with search.call as call:
            call.send(query_chunk(search.kind, search.queries, 2, 2))
            call.half_close()
            messages = call.rest()
        chunks = [*search.chunks, *(message.chunk for message in messages[:-1])]
        self._compare(search.kind, search.keys, search.queries, search.top_k, answers(chunks, search.top_k))

    # Steps that end the worker.

    def _do_kill(self) -> None:
        self._say("the worker is killed")
        wait_for(self._kill())

    def _do_kill_search(self) -> None:
        """The worker is killed under a search: it ends right, or says that the worker was lost."""
        pair, layer = self._pick()
        queries = self._queries(pair, layer, 3)
        top_k, header = self._header(pair, layer, queries)
        self._say(f"cache {pair.number} layer {layer}: the worker is killed under a search")
        call = self._calls.start_search(pair.kind, pair.cache_id, top_k, **header)
        with call:
            call.send(query_chunk(pair.kind, queries, 0, 3))
            known = self._kill()
            call.half_close()
            messages, error = call.to_the_end()
        wait_for(known)
        found = answers([message.chunk for message in messages if message.WhichOneof("message") == "chunk"], top_k)
        done = len(found[0])
        part = Queries(queries.q[:done], queries.w[:done], queries.positions[:done])
        self._compare(pair.kind, pair.model.layers[layer], part, top_k, found)
        if error is None:
            assert done == len(queries)
        else:
            assert (error.code(), messages[-1].refused.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        self._check(pair, layer)


def killer(service: RunningService) -> Kill:
    """Kills the worker of a service as nothing can prevent."""

    def kill() -> Callable[[], bool]:
        killed = set(service.worker_pids())  # none between two of them
        for worker in killed:
            os.kill(worker, signal.SIGKILL)
        return lambda: bool(set(service.worker_pids()) - killed)

    return kill


def main(arguments: list[str]) -> None:
    """One history, told."""
    settings = small_host(tempfile.gettempdir()) if "--spill" in arguments else SMALL_DEVICE
    with RunningService(settings) as service, Calls(service.address) as calls:
        calls.wait_health(1)
        CacheHistory(calls, killer(service), int(arguments[0]), tell=print).run()
        print(calls.load())


if __name__ == "__main__":
    main(sys.argv[1:])
