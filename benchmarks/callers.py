"""Callers of a running service, each in a process of its own, so that none waits for another's interpreter.

    python -m benchmarks.callers steps ADDRESS CACHE_ID --position P --top-k K --count N
    python -m benchmarks.callers flood ADDRESS CACHE_ID --position P --top-k K [--streams S]
    python -m benchmarks.callers work ADDRESS ID,ID,... --position P --top-k K [--rows R --count N]

`steps` are decode steps one after another: a SearchBatch of one row each. `flood` sends searches without end, each of a
million rows, until its standard input ends. Both say `ready` once they have had an answer, and their figures as one
line of JSON at the end. `work` says `ready` likewise; for each line of input, a number, it makes N searches of R rows
in each of the caches, so many caches at a time, and says the figures of that.

`--tokens-file FILE` has a token for each cache, its owner's, one a line: every owner is a caller of its own, on a
connection of its own. Without it all are the caller that has no name.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import streamindex_client
from streamindex.v1 import server_pb2, server_pb2_grpc
from streamindex_client import BatchItem, KeyCache
from streamindex_client.credentials import call_metadata

from streamindex_service.testing.tokens import read_tokens, write_tokens

CHUNK_ROWS = 256
FLOOD_ROWS = 1 << 20  # of one search
READY = "ready"
WATCH = "watch"  # the caller that asks the service how it is
_WARM_STEPS = 50
_START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Caller:
    """A process that calls."""

    process: subprocess.Popen[str]

    def wait_ready(self) -> None:
        """Until it has had an answer. Raises RuntimeError when it ends instead."""
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != READY:
            raise RuntimeError(f"a caller ended with exit code {self.process.wait()}")

    def go(self, at_once: int) -> None:
        """Let `work` search so many caches at a time."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{at_once}\n")
        self.process.stdin.flush()

    def done(self) -> dict[str, Any]:
        """What `work` measured since. Raises RuntimeError when it failed."""
        assert self.process.stdout is not None
        found = self.process.stdout.readline()
        if not found:
            raise RuntimeError(f"a caller ended with exit code {self.process.wait()}")
        return dict(json.loads(found))

    def figures(self) -> dict[str, Any]:
        """Let it come to its end; what it measured. Raises RuntimeError when it failed."""
        out, _ = self.process.communicate(timeout=_START_TIMEOUT_S)
        if self.process.returncode:
            raise RuntimeError(f"a caller ended with exit code {self.process.returncode}")
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found


@contextmanager
def caller(kind: str, address: str, caches: Mapping[str, KeyCache], **options: int) -> Iterator[Caller]:
    """Start a process for caches, each by its owner's token; it is ended at the end of the block."""
    ids = ",".join(cache.id for cache in caches.values())
    with tempfile.TemporaryDirectory(prefix="streamindex-caller-") as directory:
        tokens_file = Path(directory, "tokens")
        write_tokens(tokens_file, caches.keys())
        command = [sys.executable, "-m", "benchmarks.callers", kind, address, ids, "--tokens-file", str(tokens_file)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        with running(command) as made:
            yield made


@contextmanager
def running(command: Sequence[str]) -> Iterator[Caller]:
    """A caller's process, which is ended at the end of the block."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Caller(process)
    finally:
        process.kill()
        process.communicate()


def load_of(address: str, token: str) -> server_pb2.GetLoadResponse:
    """What the service says of itself."""
    with grpc.insecure_channel(address) as channel:
        stub, metadata = server_pb2_grpc.ServerServiceStub(channel), call_metadata(address, token, (), secure=False)
        return stub.GetLoad(server_pb2.GetLoadRequest(), timeout=30, metadata=metadata)


def queries(rows: int, heads: int, head_dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """q [rows, heads, head_dim] bf16 as its bits in uint16, w [rows, heads] float32."""
    random = np.random.default_rng(seed)
    q = random.standard_normal((rows, heads, head_dim), dtype=np.float32).view(np.uint32) >> 16
    w = random.standard_normal((rows, heads), dtype=np.float32) * np.float32((heads * head_dim) ** -0.5)
    return q.astype(np.uint16), w


def step_queries(cache: KeyCache) -> tuple[np.ndarray, np.ndarray]:
    """The row of every decode step."""
    return queries(1, cache.info.spec.heads, cache.info.spec.head_dim, seed=2)


def work_queries(cache: KeyCache) -> tuple[np.ndarray, np.ndarray]:
    """The chunk that every search of `work` repeats."""
    return queries(CHUNK_ROWS, cache.info.spec.heads, cache.info.spec.head_dim, seed=5)


def run_steps(client: streamindex_client.Client, cache: KeyCache, arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode steps one after another, the same each time: every answer must be the first one."""
    q, w = step_queries(cache)
    item = BatchItem(cache, 0, q, w, start_position=arguments.position)
    times, first, changed = [], None, 0
    for step in range(_WARM_STEPS + arguments.count):
        begin = time.perf_counter()
        (result,) = client.search_batch([item], top_k=arguments.top_k)
        times.append(time.perf_counter() - begin)
        if result.error is not None:
            raise result.error
        if first is None:
            first = result.indices
        changed += not np.array_equal(first, result.indices)
        if step == _WARM_STEPS:
            print(READY, flush=True)
    assert first is not None
    return {"seconds": times[_WARM_STEPS:], "changed": changed, "indices": first[0].tolist()}


class Flood:
    """Searches without end on several streams; rows that were answered count from `begin` to `stop`."""

    def __init__(self, cache: KeyCache, arguments: argparse.Namespace) -> None:
        self._cache = cache
        self._arguments = arguments
        spec = cache.info.spec
        self._chunk = queries(CHUNK_ROWS, spec.heads, spec.head_dim, seed=3)
        self._stop = threading.Event()
        self._answered = [0] * arguments.streams
        self._failed: list[BaseException] = []

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for _ in range(FLOOD_ROWS // CHUNK_ROWS):
            if self._stop.is_set():
                return
            yield self._chunk

    def _run(self, stream: int) -> None:
        try:
            while not self._stop.is_set():
                position, top_k = self._arguments.position, self._arguments.top_k
                for part in self._cache.search(layer=0, q=self._blocks(), top_k=top_k, start_position=position):
                    self._answered[stream] += part.rows
        except BaseException as error:
            self._failed.append(error)
            self._stop.set()

    def figures(self) -> dict[str, Any]:
        """Until standard input ends. Raises what a stream raised."""
        threads = [threading.Thread(target=self._run, args=(stream,)) for stream in range(self._arguments.streams)]
        for thread in threads:
            thread.start()
        while not all(self._answered) and not self._failed:
            time.sleep(0.01)
        before, begin = sum(self._answered), time.perf_counter()
        print(READY, flush=True)
        sys.stdin.read()
        rows, seconds = sum(self._answered) - before, time.perf_counter() - begin
        self._stop.set()
        for thread in threads:
            thread.join()
        if self._failed:
            raise self._failed[0]
        return {"rows": rows, "seconds": seconds}


class Work:
    """A number of searches in each of several caches, which hold the same keys: all answers must be the same."""

    def __init__(self, caches: list[KeyCache], arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._caches = caches
        self._chunk = work_queries(caches[0])

    def _search(self, cache: KeyCache, rows: int) -> tuple[int, np.ndarray]:
        """Checksum of all indices, and indices of the first row."""
        arguments = self._arguments
        blocks = (self._chunk for _ in range(rows // CHUNK_ROWS))
        indices = [
            part.indices
            for part in cache.search(layer=0, q=blocks, top_k=arguments.top_k, start_position=arguments.position)
        ]
        assert sum(map(len, indices)) == rows
        return zlib.crc32(np.concatenate(indices).tobytes()), indices[0][0].copy()

    def _all_of(self, cache: KeyCache) -> list[tuple[int, np.ndarray]]:
        return [self._search(cache, self._arguments.rows) for _ in range(self._arguments.count)]

    def serve(self) -> None:
        """Until standard input ends. Raises what a search raised."""
        for cache in self._caches:
            self._search(cache, CHUNK_ROWS)
        print(READY, flush=True)
        for text in sys.stdin:
            begin = time.perf_counter()
            with ThreadPoolExecutor(int(text)) as threads:
                answers = [answer for some in threads.map(self._all_of, self._caches) for answer in some]
            seconds = time.perf_counter() - begin
            sums = [checksum for checksum, _ in answers]
            found = {
                "seconds": seconds, "rows": len(sums) * self._arguments.rows,
                "changed": sum(each != sums[0] for each in sums), "checksum": sums[0],
                "indices": answers[0][1].tolist(),
            }  # fmt: skip
            print(json.dumps(found), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("steps", "flood", "work"))
    parser.add_argument("address")
    parser.add_argument("cache_id", help="several for `work`, joined by commas")
    parser.add_argument("--tokens-file", type=Path, metavar="FILE", help="a token for each cache, one a line")
    parser.add_argument("--position", type=int, required=True, help="of the (first) row")
    parser.add_argument("--top-k", type=int, required=True)
    parser.add_argument("--count", type=int, default=1000, help="steps, or searches of each cache")
    parser.add_argument("--streams", type=int, default=1, help="of a flood")
    parser.add_argument("--rows", type=int, default=CHUNK_ROWS, help="of a search of `work`")
    arguments = parser.parse_args()
    ids = arguments.cache_id.split(",")
    tokens = read_tokens(arguments.tokens_file) if arguments.tokens_file else [None] * len(ids)
    with ExitStack() as stack:
        clients = [stack.enter_context(streamindex_client.connect(arguments.address, token=token)) for token in tokens]
        caches = [client.open_key_cache(each) for client, each in zip(clients, ids, strict=True)]
        if arguments.kind == "work":
            Work(caches, arguments).serve()
        elif arguments.kind == "flood":
            print(json.dumps(Flood(caches[0], arguments).figures()))
        else:
            print(json.dumps(run_steps(clients[0], caches[0], arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
