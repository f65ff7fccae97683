"""What all users share: a connection, caches that they own, and calls that are locust request events."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import gevent
import numpy as np
import streamindex_client
from locust import User, constant_throughput
from locust.exception import RescheduleTask
from streamindex_client import BatchItem, ClientOptions, KeyCache, RetryPolicy, StreamIndexError

from loadtests.parameters import Parameters
from loadtests.requests_file import Outcome
from loadtests.target import share_of
from loadtests.tensors import Array, KeyRun, WrongAnswerError, shared_tensors
from streamindex_service.testing.tokens import read_tokens

_Answer = TypeVar("_Answer")
_numbers = count()


class CallError(Exception):
    """A call that did not go as it should; `outcome` says in which way. Its text is the same for the same cause."""

    def __init__(self, outcome: Outcome, text: str) -> None:
        super().__init__(text)
        self.outcome = outcome

    @classmethod
    def of(cls, error: StreamIndexError) -> CallError:
        """From the client's typed error. What the service offers to take later is a refusal, no failure."""
        refused = error.code.name == "RESOURCE_EXHAUSTED" and error.retry_after_s is not None
        outcome = Outcome.REFUSED if refused else Outcome.FAILED
        return cls(outcome, f"{type(error).__name__} {error.code.name}/{error.reason}")


@dataclass
class Sequence:
    """A cache of one layer, and what it holds."""

    cache: KeyCache
    keys: KeyRun


class ServiceUser(User):
    """A connection and a token of its own, and the scenarios' vocabulary. A call that fails ends the present task."""

    abstract = True
    scenario: ClassVar[str]

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.parameters = p = Parameters.of(environment.parsed_options)
        self.tensors = shared_tensors(p.heads, p.head_dim, p.key_format, p.load_seed)
        self.random = np.random.default_rng([p.load_seed, os.getpid(), next(_numbers)])
        self._token = next(_tokens(p.tokens_file, environment.runner.worker_index, p.tokens_processes))
        self.client = self._connect()
        self._sequences: list[Sequence] = []
        self._rate: float = getattr(p, f"{self.scenario}_rate")
        self._pace = constant_throughput(self._rate)

    def wait_time(self) -> float:
        """Seconds to the next task, at the scenario's rate."""
        wait_s: float = self._pace(self)
        return wait_s

    def on_start(self) -> None:
        """Begin at a random moment, so that users of a kind do not go in step."""
        gevent.sleep(self.random.random() / self._rate)

    def on_stop(self) -> None:
        """Leave nothing behind."""
        for sequence in list(self._sequences):
            with contextlib.suppress(RescheduleTask):
                self.drop(sequence)
        self.client.close()

    def reconnect(self) -> None:
        """Go on over a new connection."""
        self.client.close()
        self.client = self._connect()

    def call(
        self,
        name: str,
        run: Callable[[], _Answer],
        *,
        moved_bytes: int = 0,
        check: Callable[[_Answer], None] | None = None,
        check_always: bool = False,
        since: float | None = None,
    ) -> _Answer:
        """Make a call, measure it, compare a part of the answers, and tell locust.

        `since`: when it should have begun, where that is not now. Raises RescheduleTask when it failed.
        """
        start = time.monotonic() if since is None else since
        answer, failure = self._finished(run)
        latency_ms = 1000 * (time.monotonic() - start)
        compared = False
        if failure is None and check is not None:
            compared = check_always or self.random.random() < self.parameters.check_share
            failure = _difference(check, answer) if compared else None
        self.environment.events.request.fire(
            request_type=self.scenario,
            name=name,
            response_time=latency_ms,
            response_length=moved_bytes if failure is None else 0,
            exception=failure,
            context={"compared": compared},
        )
        if failure is not None:
            raise RescheduleTask
        done: _Answer = answer
        return done

    def open(self, keys: int = 0) -> Sequence:
        """Make a cache with `keys` keys."""
        p = self.parameters
        offset = int(self.random.integers(1 << 16))

        def run() -> Sequence:
            cache = self.client.create_key_cache(
                heads=p.heads,
                head_dim=p.head_dim,
                ratio=p.ratio,
                key_format=p.key_format,
                layers=1,
                timeout=p.call_timeout_s,
            )
            return self._owned(Sequence(cache, KeyRun(offset)))

        sequence = self.call("CreateKeyCache", run)
        if keys:
            self.append(sequence, keys)
        return sequence

    @contextlib.contextmanager
    def opened(self, keys: int = 0) -> Iterator[Sequence]:
        """A cache for one task."""
        sequence = self.open(keys)
        try:
            yield sequence
        finally:
            self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Delete a cache."""
        self._sequences.remove(sequence)
        self.call("DeleteKeyCache", lambda: sequence.cache.delete(timeout=self.parameters.call_timeout_s))

    def fork(self, sequence: Sequence, keys: int) -> Sequence:
        """A cache that shares the first `keys` keys."""

        def run() -> Sequence:
            cache = sequence.cache.fork(keys=keys, timeout=self.parameters.call_timeout_s)
            return self._owned(Sequence(cache, KeyRun(sequence.keys.offset, keys)))

        return self.call("ForkKeyCache", run)

    def append(self, sequence: Sequence, count: int) -> None:
        """Add keys."""
        keys = self.tensors.key_rows(sequence.keys, count)
        after = sequence.keys.length + count

        def all_there(length: int) -> None:
            if length != after:
                raise WrongAnswerError(f"the layer has {length} keys, not {after}")

        self.call(
            "AppendKeys",
            lambda: sequence.cache.append(
                layer=0, keys=keys, first_row=sequence.keys.length, timeout=self.parameters.call_timeout_s
            ),
            moved_bytes=keys.nbytes,
            check=all_there,
            check_always=True,
        )
        sequence.keys.length = after

    def search(
        self,
        name: str,
        sequence: Sequence,
        rows: int,
        *,
        position: int | None = None,
        priority: str | None = None,
        rows_per_s: float = math.inf,
    ) -> None:
        """Search with `rows` queries, the first at `position`; by default the last one sees every key.

        `rows_per_s`: how fast the answer is read.
        """
        p = self.parameters
        first = self._random_query()
        q, w = self.tensors.query_rows(first, rows)
        start = self._last_position(sequence.keys, rows) if position is None else position

        def run() -> Array:
            parts = []
            with sequence.cache.search(
                layer=0,
                q=q,
                w=w,
                top_k=p.top_k,
                start_position=start,
                priority=priority,
                timeout=p.call_timeout_s,
            ) as stream:
                for part in stream:
                    parts.append(part.indices)
                    gevent.sleep(part.rows / rows_per_s)
            return np.concatenate(parts)

        self.call(
            name,
            run,
            moved_bytes=q.nbytes + w.nbytes + 4 * p.top_k * rows,
            check=self._comparison(sequence.keys, first, rows, start),
        )

    def search_batch(
        self,
        sequences: SequenceOf[Sequence],
        rows: int = 1,
        *,
        append: int = 0,
        priority: str | None = None,
        timeout_s: float | None = None,
        since: float | None = None,
    ) -> None:
        """One SearchBatch with `rows` queries at the end of each sequence, to which `append` keys are added before."""
        p = self.parameters
        items, comparisons = [], []
        for sequence in sequences:
            keys = self.tensors.key_rows(sequence.keys, append) if append else None
            grown = KeyRun(sequence.keys.offset, sequence.keys.length + append)
            first, start = self._random_query(), self._last_position(grown, rows)
            q, w = self.tensors.query_rows(first, rows)
            items.append(
                BatchItem(sequence.cache, 0, q, w, start_position=start, keys=keys, first_row=sequence.keys.length)
            )
            comparisons.append(self._comparison(grown, first, rows, start))

        def run() -> list[Array]:
            results = self.client.search_batch(
                items, top_k=p.top_k, priority=priority, timeout=timeout_s or p.call_timeout_s
            )
            for result in results:
                if result.error is not None:
                    raise result.error
            return [result.indices for result in results]

        def compare(answers: list[Array]) -> None:
            for comparison, indices in zip(comparisons, answers, strict=True):
                comparison(indices)

        sent_bytes = sum(item.q.nbytes + item.w.nbytes + (item.keys.nbytes if append else 0) for item in items)
        self.call(
            "SearchBatch",
            run,
            moved_bytes=sent_bytes + 4 * p.top_k * rows * len(items),
            check=compare,
            since=since,
        )
        for sequence in sequences:
            sequence.keys.length += append

    def _finished(self, run: Callable[[], _Answer]) -> tuple[Any, CallError | None]:
        """The end of a call, even when this user is told to stop meanwhile.

        Locust stops a user by killing its greenlet, and may meet it in a call: a cache that was made by then would
        have no owner. So calls have greenlets of their own, which are waited for.
        """
        attempt = gevent.spawn(_ending, run)
        try:
            answer, error = attempt.get()
        except gevent.GreenletExit:
            attempt.join()
            raise
        if isinstance(error, StreamIndexError):
            return None, CallError.of(error)
        if error is not None:
            raise error
        return answer, None

    def _owned(self, sequence: Sequence) -> Sequence:
        self._sequences.append(sequence)
        return sequence

    def _comparison(self, keys: KeyRun, first: int, rows: int, start: int) -> Callable[[Array], None]:
        """Compares one row of an answer with the reference; of keys as they are now."""
        held = KeyRun(keys.offset, keys.length)
        row = int(self.random.integers(rows))
        ratio = self.parameters.ratio
        return lambda indices: self.tensors.check(indices, held, ratio, (first, rows), start, row)

    def _last_position(self, keys: KeyRun, rows: int) -> int:
        """Where the first of `rows` queries stands, if the last one sees every key."""
        return max(0, keys.length * self.parameters.ratio - rows)

    def _random_query(self) -> int:
        return int(self.random.integers(1 << 16))

    def _connect(self) -> streamindex_client.Client:
        p = self.parameters
        return streamindex_client.connect(
            p.address, options=ClientOptions(retry=RetryPolicy(max_attempts=p.max_attempts)), token=self._token
        )


@functools.cache
def _tokens(file: str, number: int, processes: int) -> Iterator[str | None]:
    """Of the users of this process in turn. Raises OSError, ValueError."""
    return cycle(share_of(read_tokens(Path(file)), number, processes) if file else [None])


def _ending(run: Callable[[], _Answer]) -> tuple[_Answer | None, Exception | None]:
    try:
        return run(), None
    except Exception as error:
        return None, error


def _difference(check: Callable[[_Answer], None], answer: _Answer) -> CallError | None:
    """What is wrong. The reference runs on a thread of its own: it must not hold up the other users' calls."""
    try:
        gevent.get_hub().threadpool.apply(check, (answer,))
    except WrongAnswerError as error:
        return CallError(Outcome.WRONG, f"WrongAnswerError {error}")
    return None
