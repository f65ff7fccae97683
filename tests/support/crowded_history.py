"""Seeded histories on a device with room for two tiles and little beside them, so that pages have to move together.

    python -m tests.support.crowded_history 4711 30     # one history of 30 steps, told one by one

To the steps of `cache_history` come searches of which two have a tile on the device at once, and caches that grow among
each other's pages, of which all but one go while it is searched: what is left is spread over extents that are nearly
empty, and the second tile has no room beside them unless they are emptied.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from streamindex_service.testing.service import RunningService
from tests.support.cache_history import KINDS, CacheHistory, Kill, Pair, killer
from tests.support.calls import Calls, answers, query_chunk
from tests.support.services import MIB, SMALL_DEVICE, wait_for
from tests.support.tensors import ModelCache

# Each tile needs 16 MiB and a few rows; an extent is a quarter of a MiB.
TWO_TILES = {
    **SMALL_DEVICE,
    "memory": {**SMALL_DEVICE["memory"], "device_budget_bytes": 2 * 16 * MIB + 3 * MIB // 4},
}
GROWN = 4  # caches that grow in turn, by so many pages

Stop = Callable[[bool], None]
"""Stops the worker, or lets it go on."""


class CrowdedHistory(CacheHistory):
    """One seed's history. `stop` holds up the service's worker."""

    def __init__(
        self, calls: Calls, kill: Kill, stop: Stop, seed: int, steps: int, tell: Any = lambda line: None
    ) -> None:
        super().__init__(calls, kill, seed, tell, steps)
        self._stop = stop

    def _choose_step(self) -> str:
        if not self.steps["crowd"]:
            return "crowd"
        chance = float(self._random.random())
        if chance < 0.25:
            return "two_at_once" if chance > 0.05 else "crowd"
        return super()._choose_step()

    def _do_two_at_once(self) -> None:
        self._search_two((self._pick(), self._pick()))

    def _do_crowd(self) -> None:
        with self._extra() as extra:
            grown = [extra(1) for _ in range(GROWN)]  # of pages of which four are an extent
            small = extra(2)
            self._append_to(small, 100)
            for _ in range(GROWN):
                for pair in grown:
                    self._append_to(pair, 256)
                    self._check(pair, 0)
            stays = grown[0]
            queries = self._queries(stays, 0, 4)
            top_k, header = self._header(stays, 0, queries)
            with self._calls.start_search(stays.kind, stays.cache_id, top_k, **header) as call:
                call.send(query_chunk(stays.kind, queries, 0, 2))
                chunks = [call.receive("chunk")]
                for pair in grown[1:]:
                    self._calls.delete(pair.cache_id)
                    self._pairs.remove(pair)
                self._search_two(((small, 0), (small, 0)))
                call.send(query_chunk(stays.kind, queries, 2, 2))
                call.half_close()
                chunks += [message.chunk for message in call.rest()[:-1]]
            self._compare(stays.kind, stays.model.layers[0], queries, top_k, answers(chunks, top_k))

    @contextmanager
    def _extra(self) -> Iterator[Callable[[int], Pair]]:
        """Makes caches of a kind, by its number, that go afterwards."""
        made: list[Pair] = []

        def make(number: int) -> Pair:
            self._made += 1
            kind = KINDS[number]
            made.append(Pair(self._made, self._calls.create(kind).id, ModelCache(kind)))
            self._pairs.append(made[-1])
            return made[-1]

        yield make
        for pair in made:
            if pair in self._pairs:
                self._calls.delete(pair.cache_id)
                self._pairs.remove(pair)

    def _append_to(self, pair: Pair, rows: int) -> None:
        keys, first = self._draw.keys(pair.kind, rows), len(pair.model.layers[0])
        pair.model.write(0, first, keys)
        assert self._calls.upload(pair.kind, pair.cache_id, keys, first, 0, 300) == len(pair.model.layers[0])

    def _search_two(self, targets: tuple[tuple[Pair, int], ...]) -> None:
        """The worker does nothing until both have a tile there, or wait for room."""
        asked = []
        self._stop(True)
        try:
            for number, (pair, layer) in enumerate(targets, 1):
                queries = self._queries(pair, layer, 2)
                top_k, header = self._header(pair, layer, queries)
                self._say(f"cache {pair.number} layer {layer}: a search with a tile on the device")
                call = self._calls.start_search(pair.kind, pair.cache_id, top_k, **header)
                call.send(query_chunk(pair.kind, queries, 0, 2))
                call.half_close()
                asked.append((call, pair, layer, queries, top_k))
                wait_for(lambda waited_for=number: self._there() >= waited_for)
        finally:
            self._stop(False)
        for call, pair, layer, queries, top_k in asked:
            with call:
                chunks = [message.chunk for message in call.rest()[:-1]]
            self._compare(pair.kind, pair.model.layers[layer], queries, top_k, answers(chunks, top_k))

    def _there(self) -> int:
        load = self._calls.load()
        return int(load.device.tiles + load.queue.tiles)


def stopper(service: RunningService) -> Stop:
    """Holds up the worker of a service."""

    def stop(held: bool) -> None:
        for worker in service.worker_pids():
            os.kill(worker, signal.SIGSTOP if held else signal.SIGCONT)

    return stop


def main(arguments: list[str]) -> None:
    """One history, told."""
    with RunningService(TWO_TILES) as service, Calls(service.address) as calls:
        calls.wait_health(1)
        CrowdedHistory(calls, killer(service), stopper(service), int(arguments[0]), int(arguments[1]), tell=print).run()
        print(calls.load().device)


if __name__ == "__main__":
    main(sys.argv[1:])
