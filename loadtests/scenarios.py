"""The scenarios: each a kind of user. Every step is a locust request event named after the call that it makes."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
from gevent.pool import Pool
from locust import task
from locust.exception import RescheduleTask
from streamindex_client import NotFoundError

from loadtests.parameters import DECODED_KEYS
from loadtests.requests_file import Outcome
from loadtests.tensors import Array, WrongAnswerError
from loadtests.user import CallError, Sequence, ServiceUser


class DecodeUser(ServiceUser):
    """Decode: ragged sequences that grow key by key, all of them searched in one call a step."""

    scenario = "decode"

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        p = self.parameters
        self._lengths = [max(1, p.context_keys // (number + 1)) for number in range(p.decode_sequences)]
        self._batch: list[Sequence] = []

    @task
    def step(self) -> None:
        """One step: a key for each sequence, then its top k."""
        while len(self._batch) < len(self._lengths):
            self._batch.append(self.open(self._lengths[len(self._batch)]))
        self.search_batch(self._batch, append=1)
        if self._batch[0].keys.length >= self._lengths[0] + DECODED_KEYS:
            for sequence, length in zip(self._batch, self._lengths, strict=True):
                self._cut(sequence, length)

    def _cut(self, sequence: Sequence, length: int) -> None:
        self.call(
            "TruncateKeys", lambda: sequence.cache.truncate(length, layer=0, timeout=self.parameters.call_timeout_s)
        )
        sequence.keys.length = length


class PrefillUser(ServiceUser):
    """Chunked prefill: each chunk's keys, then its queries, until the prompt is done."""

    scenario = "prefill"

    @task
    def prompt(self) -> None:
        """One prompt."""
        p = self.parameters
        with self.opened() as sequence:
            for start in range(0, p.prefill_tokens, p.prefill_chunk_tokens):
                rows = min(p.prefill_chunk_tokens, p.prefill_tokens - start)
                new = (start + rows) // p.ratio - sequence.keys.length
                if new:
                    self.append(sequence, new)
                self.search("Search", sequence, rows, position=start)


class UploadUser(ServiceUser):
    """A long upload, and a look at what has arrived."""

    scenario = "upload"

    @task
    def upload(self) -> None:
        """One layer."""
        with self.opened(self.parameters.upload_keys) as sequence:
            self.search("Search", sequence, 1)


class TenantsUser(ServiceUser):
    """Mixed tenants: short interactive, middling standard and long batch searches of one cache, six to three to one."""

    scenario = "tenants"

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self._context: Sequence | None = None

    @task(6)
    def interactive(self) -> None:
        """A row or a few, before everybody else."""
        self._search("interactive", int(self.random.integers(1, 5)))

    @task(3)
    def standard(self) -> None:
        """An eighth of a batch."""
        self._search("standard", max(1, self.parameters.tenants_batch_rows // 8))

    @task(1)
    def batch(self) -> None:
        """Many rows, after everybody else."""
        self._search("batch", self.parameters.tenants_batch_rows)

    def _search(self, priority: str, rows: int) -> None:
        if self._context is None:
            self._context = self.open(self.parameters.context_keys)
        self.search(f"Search ({priority})", self._context, rows, priority=priority)


class ChurnUser(ServiceUser):
    """Open, use, drop: a connection, a cache and its fork; what was dropped is not there any more."""

    scenario = "churn"

    @task
    def open_use_drop(self) -> None:
        """One life."""
        p = self.parameters
        self.reconnect()
        with self.opened(p.churn_keys) as sequence:
            self.search("Search", sequence, 4)
            fork = self.fork(sequence, sequence.keys.length // 2)
            try:
                self.search("Search (fork)", fork, 4)
            finally:
                self.drop(fork)
        self.call("GetKeyCache (dropped)", lambda: self._look_for(sequence.cache.id), check=_is_gone, check_always=True)

    def _look_for(self, cache_id: str) -> bool:
        try:
            self.client.open_key_cache(cache_id, timeout=self.parameters.call_timeout_s)
        except NotFoundError:
            return False
        return True


def _is_gone(found: bool) -> None:
    if found:
        raise WrongAnswerError("a cache that was deleted is still there")


class SlowReaderUser(ServiceUser):
    """A search whose answer is read at a small rate, which makes most of its latency."""

    scenario = "slow_reader"

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self._context: Sequence | None = None

    @task
    def read_slowly(self) -> None:
        """One search."""
        p = self.parameters
        if self._context is None:
            self._context = self.open(p.context_keys)
        self.search("Search (slow)", self._context, p.slow_reader_rows, rows_per_s=p.slow_reader_rows_per_s)


class _LeftError(Exception):
    """Raised out of an upload to leave it."""


class AbortUser(ServiceUser):
    """Searches left after their first answers, uploads left after their start; what is there then must be right."""

    scenario = "abort"

    @task
    def abort(self) -> None:
        """One of each."""
        p = self.parameters
        with self.opened(p.context_keys) as sequence:
            self._leave_search(sequence)
            self.search("Search (after leaving one)", sequence, 1)
            self._leave_upload(sequence)
            self.search("Search (after leaving an upload)", sequence, 1)

    def _leave_search(self, sequence: Sequence) -> None:
        p = self.parameters
        q, w = self.tensors.query_rows(0, p.abort_rows)

        def run() -> Array:
            with sequence.cache.search(
                layer=0, q=q, w=w, top_k=p.top_k, start_position=0, timeout=p.call_timeout_s
            ) as stream:
                return np.asarray(next(stream).indices)

        self.call("Search (left)", run, moved_bytes=q.nbytes + w.nbytes)

    def _leave_upload(self, sequence: Sequence) -> None:
        """All or nothing: what was left is not there, unless all of it had come."""
        p = self.parameters
        timeout_s = p.call_timeout_s
        before = sequence.keys.length
        keys = self.tensors.key_rows(sequence.keys, p.abort_keys)

        def leave(done: int, total: int) -> None:
            raise _LeftError

        def run() -> None:
            with contextlib.suppress(_LeftError):
                sequence.cache.append(layer=0, keys=keys, first_row=before, progress=leave, timeout=timeout_s)

        def all_or_nothing(length: int) -> None:
            if length not in (before, before + p.abort_keys):
                raise WrongAnswerError("a part of an upload is there")

        self.call("AppendKeys (left)", run)
        sequence.keys.length = self.call(
            "GetKeyCache (after leaving an upload)",
            lambda: sequence.cache.refresh(timeout=timeout_s).layer_keys[0],
            check=all_or_nothing,
            check_always=True,
        )


class ArrivalsUser(ServiceUser):
    """Arrivals at a fixed rate, whatever the service does: latency counts from when a call should have begun."""

    scenario = "arrivals"

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self._arrivals = Pool()
        self._due = 0.0

    def on_stop(self) -> None:
        """Wait for the answers that are due."""
        self._arrivals.join()
        super().on_stop()

    def wait_time(self) -> float:
        """Seconds to the next arrival of a Poisson process."""
        p = self.parameters
        now = time.monotonic()
        gap_s = self.random.exponential(p.arrivals_users / p.arrivals_rate)
        self._due = (self._due or now) + gap_s
        return max(0.0, self._due - now)

    @task
    def arrive(self) -> None:
        """Send a call and do not wait for it."""
        p = self.parameters
        while len(self._sequences) < p.decode_sequences:
            self.open(p.context_keys)
        if not self._due:
            return  # the first task comes before the first wait, at no time of the process
        if len(self._arrivals) >= p.max_outstanding:
            self.environment.events.request.fire(
                request_type=self.scenario,
                name="SearchBatch",
                response_time=0.0,
                response_length=0,
                exception=CallError(Outcome.BROKEN, f"more than {p.max_outstanding} calls are unanswered"),
                context={"compared": False},
            )
            return
        self._arrivals.spawn(self._one, self._sequences[int(self.random.integers(len(self._sequences)))], self._due)

    def _one(self, sequence: Sequence, due: float) -> None:
        p = self.parameters
        with contextlib.suppress(RescheduleTask):
            self.search_batch([sequence], p.arrivals_rows, timeout_s=p.arrivals_deadline_s, since=due)
