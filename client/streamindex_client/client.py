"""The blocking client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from streamindex_client import operations
from streamindex_client.attend import AttendPart
from streamindex_client.attend_batch import AttendBatchItem, AttendBatchResult, build_attend_batch
from streamindex_client.attend_requests import attend_source
from streamindex_client.batch import BatchItem, BatchResult, build_batch
from streamindex_client.credentials import Tls, call_metadata, channel_credentials, tls_options
from streamindex_client.formats import KeyFormat, Priority, ResultOrder, RowKind, SearchMode
from streamindex_client.handles import (
    AttendCollector,
    AttendResult,
    CacheHandle,
    Collector,
    SearchResult,
    cache_spec,
)
from streamindex_client.options import ClientOptions
from streamindex_client.requests import chosen_rows, search_source
from streamindex_client.retry import Environment
from streamindex_client.search import SearchPart
from streamindex_client.sync_driver import SyncDriver
from streamindex_client.target import channel_options, grpc_target
from streamindex_client.watch import watch_load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from streamindex_client.attend import AttendSession, AttendSummary
    from streamindex_client.model import Capabilities, KeyCacheInfo, KvSpec, Load, UploadState
    from streamindex_client.search import SearchSession, SearchSummary

__all__ = ["AttendStream", "Client", "KeyCache", "SearchStream", "connect"]

_Part = TypeVar("_Part")


def connect(
    target: str,
    *,
    options: ClientOptions | None = None,
    tls: Tls | None = None,
    token: str | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    metadata: Sequence[tuple[str, str]] = (),
) -> Client:
    """A client of the service at `unix:///path`, `host:port` or `tcp://host:port`; connects on its first call.

    `tls`: for a server beyond this host. `token`: who calls, as the server's operator has given it. `credentials`:
    gRPC's own, in the place of `tls`. `metadata` goes with every call. Raises InputError, also for a token that would
    cross a network in the clear.
    """
    env = Environment(options or ClientOptions())
    credentials = channel_credentials(target, tls, credentials)
    metadata = call_metadata(target, token, metadata, secure=credentials is not None)
    arguments = [*channel_options(env.options), *tls_options(tls)]
    if credentials is None:
        channel = grpc.insecure_channel(grpc_target(target), arguments)
    else:
        channel = grpc.secure_channel(grpc_target(target), credentials, arguments)
    return Client(SyncDriver(channel, tuple(metadata), env.new_key), env)


class Client:
    """A connection. Thread-safe. Every method may raise the errors of `streamindex_client.errors`.

    `timeout` is seconds for the whole operation, retries included; None takes the options' default.
    """

    def __init__(self, driver: SyncDriver, env: Environment) -> None:
        self._driver = driver
        self._env = env

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; caches stay on the server."""
        self._driver.close()

    def create_key_cache(
        self,
        *,
        heads: int,
        head_dim: int,
        ratio: int,
        key_format: KeyFormat | str,
        layers: int,
        convention: str = "",
        expected_keys: int = 0,
        idle_ttl_s: int = 0,
        priority: Priority | str = Priority.STANDARD,
        kv: KvSpec | None = None,
        timeout: float | None = None,
    ) -> KeyCache:
        """Make an empty cache; see `KeyCacheSpec` for the arguments. Raises ResourceExhaustedError, InputError."""
        spec = cache_spec(
            heads, head_dim, ratio, key_format, layers, convention, expected_keys, idle_ttl_s, priority, kv
        )
        return KeyCache(self, self._driver.run(operations.create_key_cache(self._env, spec, timeout)))

    def open_key_cache(self, cache_id: str, *, timeout: float | None = None) -> KeyCache:
        """A cache made earlier by the same caller. Raises NotFoundError."""
        return KeyCache(self, self._driver.run(operations.get_key_cache(self._env, cache_id, timeout)))

    def list_key_caches(self, *, timeout: float | None = None) -> list[KeyCache]:
        """The caller's caches, oldest first."""
        return [KeyCache(self, info) for info in self._driver.run(operations.list_key_caches(self._env, timeout))]

    def query_upload(self, upload_id: str, *, timeout: float | None = None) -> UploadState:
        """How far an upload has come. Raises NotFoundError once it has expired."""
        return self._driver.run(operations.query_upload(self._env, upload_id, timeout))

    def search_batch(
        self,
        items: Sequence[BatchItem],
        *,
        top_k: int,
        order: ResultOrder | str = ResultOrder.SCORE,
        mode: SearchMode | str = SearchMode.EXACT,
        want_scores: bool = False,
        priority: Priority | str | None = None,
        timeout: float | None = None,
    ) -> list[BatchResult]:
        """A ragged decode step in one round trip; a failed item has its `error` set and fails no other.

        `priority`: of all items; None is INTERACTIVE, whatever the caches' are.
        """
        batch = build_batch(items, top_k=top_k, order=order, mode=mode, want_scores=want_scores, priority=priority)
        return self._driver.run(operations.search_batch(self._env, batch, timeout))

    def sparse_attend_batch(
        self,
        items: Sequence[AttendBatchItem],
        *,
        scale: float,
        top_k: int | None = None,
        all_visible: bool = False,
        window: int = 0,
        sink: Any = None,
        want_lse: bool = False,
        want_indices: bool = False,
        priority: Priority | str | None = None,
        timeout: float | None = None,
    ) -> list[AttendBatchResult]:
        """Sparse attention of a ragged decode step in one round trip: a few rows in each of many caches.

        Rows that items bring for their caches are written first, all of them.
        `top_k` names how many index keys are found for a row; None: items carry `indices`, unless rows attend
        `all_visible` KV rows. These, window, scale, sink and want_lse are those of `KeyCache.sparse_attend`, the same
        for all items, as of one layer of a model; `want_indices`: what was found comes with the outputs. `priority`: of
        all items; None is INTERACTIVE, whatever the caches' are. A failed item has its `error` set and fails no other;
        rows are answered as `sparse_attend` answers them, but for the order of sums, and the same bits whatever the
        other items are. Raises InputError naming the item.
        """
        batch = build_attend_batch(
            items, top_k=top_k, all_visible=all_visible, window=window, scale=scale, sink=sink, want_lse=want_lse,
            want_indices=want_indices, priority=priority,
        )  # fmt: skip
        return self._driver.run(operations.sparse_attend_batch(self._env, batch, timeout))

    def capabilities(self, *, timeout: float | None = None) -> Capabilities:
        """Limits, formats and implementations."""
        return self._driver.run(operations.capabilities(self._env, timeout))

    def load(self, *, timeout: float | None = None) -> Load:
        """Ledgers, queue and caches."""
        return self._driver.run(operations.load(self._env, timeout))

    def watch_load(self, *, interval_s: float = 1.0, timeout: float | None = None) -> Iterator[Load]:
        """The load again and again, every `interval_s` seconds (0.1 to 60), until the iteration is left.

        A connection that breaks is made anew. Raises InputError at once; ResourceExhaustedError when as many watch as
        may, UnavailableError after the retries, DeadlineError while iterating.
        """
        return self._driver.events(watch_load(self._env, interval_s, timeout))

    def wait_ready(self, timeout: float) -> None:
        """Until the service admits searches. Raises DeadlineError after `timeout` seconds."""
        self._driver.run(operations.wait_ready(self._env, timeout))


class _PartStream(Generic[_Part]):
    """The answer of a call, part by part; also a context manager."""

    def __init__(self, parts: Any) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[_Part]:
        return self

    def __next__(self) -> _Part:
        part: _Part = next(self._parts)
        return part

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is not answered yet."""
        self._parts.close()


class SearchStream(_PartStream[SearchPart]):
    """The answer of a search, part by part; also a context manager. `summary` is complete after the last part."""

    def __init__(self, session: SearchSession, parts: Any) -> None:
        super().__init__(parts)
        self._session = session

    @property
    def summary(self) -> SearchSummary:
        """What is known of the call so far."""
        return self._session.summary


class AttendStream(_PartStream[AttendPart]):
    """The answer of attention, part by part; also a context manager. `summary` is complete after the last part."""

    def __init__(self, session: AttendSession, parts: Any) -> None:
        super().__init__(parts)
        self._session = session

    @property
    def summary(self) -> AttendSummary:
        """What is known of the call so far."""
        return self._session.summary


class KeyCache(CacheHandle):
    """A cache on the server."""

    def __init__(self, client: Client, info: KeyCacheInfo) -> None:
        super().__init__(info)
        self._client = client

    def append(
        self,
        *,
        layer: int,
        keys: Any = None,
        kv_rows: Any = None,
        window_rows: Any = None,
        scales: Any = None,
        first_row: int | None = None,
        progress: Callable[[int, int], object] | None = None,
        resume_upload_id: str | None = None,
        timeout: float | None = None,
    ) -> int:
        """Write rows of one kind of a layer, exactly one of `keys`, `kv_rows` and `window_rows`; its length afterwards.

        keys [keys, head_dim] in the cache's format, with `scales` [keys] float32 for FP8_E4M3. kv_rows, one for each
        key, and window_rows, one a token, [rows, key_dim] bf16 (or uint16), or [rows, bytes] uint8 in a packed format,
        for FP8_D512 with `scales` [rows, 8] uint8. `first_row` None: at the present length. `progress(done_rows,
        total_rows)` is called as the server acknowledges rows. Nothing is visible before all is. A broken connection
        is resumed; an error carries `metadata["upload_id"]`, which with the same rows as `resume_upload_id` goes on
        later. Raises InputError, NonFiniteError, DataLossError, UploadConflictError, ResourceExhaustedError.
        """
        tensors = {RowKind.KEYS: keys, RowKind.KV: kv_rows, RowKind.WINDOW: window_rows}
        kind, rows = chosen_rows(self.info.spec, tensors, scales)
        operation = operations.append_keys(
            self._client._env,
            self.info,
            layer=layer,
            kind=kind,
            rows=rows,
            first_row=first_row,
            progress=progress,
            resume_upload_id=resume_upload_id,
            timeout_s=timeout,
        )
        return self._note_length(layer, self._client._driver.run(operation), kind)

    def search(
        self,
        *,
        layer: int,
        q: Any,
        w: Any = None,
        top_k: int,
        start_position: int | None = None,
        positions: Any = None,
        order: ResultOrder | str = ResultOrder.SCORE,
        mode: SearchMode | str = SearchMode.EXACT,
        want_scores: bool = False,
        priority: Priority | str | None = None,
        convention: str | None = None,
        timeout: float | None = None,
    ) -> SearchStream:
        """The top_k visible keys of every query row, part by part while later queries are being sent.

        q [rows, heads, head_dim] in the cache's format, w [rows, heads] float32, and `start_position` or `positions`
        [rows]. Or q an iterator of (q, w) chunks (with `start_position`) or of (q, w, positions) chunks, of any
        lengths and without end: at most `ClientOptions.search_window_*` of it is held. A caller who reads slowly
        slows the sending down. Raises InputError at once; ConventionMismatchError, NonFiniteError, WorkerLostError
        (after the retries), DeadlineError while iterating, as well as what the iterator raises.
        """
        source = search_source(
            self._client._env,
            self.info,
            layer=layer,
            q=q,
            w=w,
            top_k=top_k,
            start_position=start_position,
            positions=positions,
            order=order,
            mode=mode,
            want_scores=want_scores,
            priority=priority,
            convention=convention,
        )
        operation = operations.search(self._client._env, source.session, timeout)
        return SearchStream(source.session, self._client._driver.events(operation, source.blocks))

    def search_all(self, **arguments: Any) -> SearchResult:
        """`search` with the same arguments, as one result of all rows."""
        with self.search(**arguments) as stream:
            collector = Collector(stream._session)
            for part in stream:
                collector.add(part)
            return collector.result()

    def sparse_attend(
        self,
        *,
        layer: int,
        q: Any,
        index_q: Any = None,
        index_w: Any = None,
        top_k: int | None = None,
        indices: Any = None,
        all_visible: bool = False,
        start_position: int | None = None,
        positions: Any = None,
        window: int = 0,
        scale: float,
        sink: Any = None,
        want_lse: bool = False,
        priority: Priority | str | None = None,
        convention: str | None = None,
        progress: Callable[[int, int], object] | None = None,
        timeout: float | None = None,
    ) -> AttendStream:
        """Attention of every query row over its window and the KV rows of its indices, part by part.

        q [rows, heads, key_dim] bf16 (or uint16), and `start_position` or `positions` [rows]. The indices are those
        that a search with index_q [rows, indexer heads, head_dim] and index_w [rows, indexer heads] float32 finds, with
        `top_k`; or `indices` [rows, entries], of which -1 and what is out of range contribute nothing; or, with
        `all_visible`, all KV rows below (position + 1) // ratio, as in a layer of ratio 128 (HCA). `window` tokens up
        to the query's own, 0 for none. `scale` of the logits; `sink` [heads], a logit that adds to the denominator.
        `want_lse`: the log-sum-exp comes too. `progress(done_rows, total_rows)`, total 0 when unknown.

        Or q an iterator of chunks, (q, index_q, index_w) with top_k, (q, indices) with `indices` the number of
        entries, (q,) with all_visible, and positions last where there is no start_position; it is held and sent as in
        `search`.

        Raises InputError at once; FailedPreconditionError (NO_KV_ROWS), NonFiniteError, WorkerLostError (after the
        retries), DeadlineError while iterating, as well as what the iterator raises.
        """
        source = attend_source(
            self._client._env,
            self.info,
            layer=layer,
            q=q,
            index_q=index_q,
            index_w=index_w,
            top_k=top_k,
            indices=indices,
            all_visible=all_visible,
            start_position=start_position,
            positions=positions,
            window=window,
            scale=scale,
            sink=sink,
            want_lse=want_lse,
            priority=priority,
            convention=convention,
        )
        operation = operations.sparse_attend(self._client._env, source.session, timeout, progress)
        return AttendStream(source.session, self._client._driver.events(operation, source.blocks))

    def sparse_attend_all(self, **arguments: Any) -> AttendResult:
        """`sparse_attend` with the same arguments, as one result of all rows."""
        with self.sparse_attend(**arguments) as stream:
            collector = AttendCollector(stream._session)
            for part in stream:
                collector.add(part)
            return collector.result()

    def truncate(
        self, keys: int, *, layer: int | None = None, window_rows: int | None = None, timeout: float | None = None
    ) -> None:
        """Shorten a layer, or all, to at most `keys` keys and KV rows.

        `window_rows` None: to as many tokens as go with so many keys.
        """
        client = self._client
        operation = operations.truncate_keys(client._env, self.info, keys, layer, window_rows, timeout)
        self._info = client._driver.run(operation)

    def fork(
        self, *, keys: int | None = None, window_rows: int | None = None, timeout: float | None = None
    ) -> KeyCache:
        """A new cache that shares this one's rows, of each layer as many as `truncate` would leave; None is all."""
        client = self._client
        operation = operations.fork_key_cache(client._env, self.info, keys, window_rows, timeout)
        return KeyCache(client, client._driver.run(operation))

    def delete(self, *, timeout: float | None = None) -> None:
        """Drop the cache; searches that run keep the rows they started with."""
        self._client._driver.run(operations.delete_key_cache(self._client._env, self.id, timeout))

    def refresh(self, *, timeout: float | None = None) -> KeyCacheInfo:
        """Ask the server for the cache's state; also in `info` then."""
        self._info = self._client._driver.run(operations.get_key_cache(self._client._env, self.id, timeout))
        return self._info
