"""Every call of the client as an operation: the protocol logic that the sync and the asyncio client share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf import message
from streamindex.v1 import key_cache_pb2, server_pb2

from streamindex_client import contract
from streamindex_client.effects import Call, Close, Emit, Notify, Open, Operation, Read, Sleep
from streamindex_client.errors import DeadlineError, NotFoundError, StreamIndexError, UnavailableError
from streamindex_client.model import Capabilities, KeyCacheInfo, KeyCacheSpec, Load, UploadState
from streamindex_client.requests import check_layer, upload_start
from streamindex_client.tensors import unsigned
from streamindex_client.upload import UploadSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamindex_client.attend import AttendSession
    from streamindex_client.attend_batch import AttendBatchRequest, AttendBatchResult
    from streamindex_client.batch import BatchRequest, BatchResult
    from streamindex_client.formats import RowKind
    from streamindex_client.retry import Deadline, Environment
    from streamindex_client.row_session import RowSession
    from streamindex_client.search import SearchSession
    from streamindex_client.upload import KeyRows

__all__ = [
    "append_keys",
    "capabilities",
    "create_key_cache",
    "delete_key_cache",
    "fork_key_cache",
    "get_key_cache",
    "list_key_caches",
    "load",
    "query_upload",
    "search",
    "search_batch",
    "sparse_attend",
    "sparse_attend_batch",
    "truncate_keys",
    "wait_ready",
]


def unary(
    env: Environment,
    method: contract.Method,
    request: message.Message,
    deadline: Deadline,
    *,
    idempotent: bool = True,
) -> Operation[Any]:
    """One unary call with its retries; the response message."""
    retrier = env.retrier(deadline)
    while True:
        try:
            return (yield Call(method, request, deadline.remaining_s()))
        except StreamIndexError as error:
            yield Sleep(retrier.delay_s(error, idempotent=idempotent))


def create_key_cache(env: Environment, spec: KeyCacheSpec, timeout_s: float | None) -> Operation[KeyCacheInfo]:
    """Make a cache. Not idempotent: tried again only where the server offers it."""
    request = key_cache_pb2.CreateKeyCacheRequest(spec=spec.to_wire())
    answer = yield from unary(env, contract.CREATE_KEY_CACHE, request, env.deadline(timeout_s), idempotent=False)
    return KeyCacheInfo.from_wire(answer.key_cache)


def get_key_cache(env: Environment, cache_id: str, timeout_s: float | None) -> Operation[KeyCacheInfo]:
    """Read a cache's state."""
    request = key_cache_pb2.GetKeyCacheRequest(key_cache_id=cache_id)
    answer = yield from unary(env, contract.GET_KEY_CACHE, request, env.deadline(timeout_s))
    return KeyCacheInfo.from_wire(answer.key_cache)


def list_key_caches(env: Environment, timeout_s: float | None) -> Operation[list[KeyCacheInfo]]:
    """All pages of the caller's caches, oldest first."""
    deadline = env.deadline(timeout_s)
    found: list[KeyCacheInfo] = []
    token = ""
    while True:
        request = key_cache_pb2.ListKeyCachesRequest(page_token=token)
        answer = yield from unary(env, contract.LIST_KEY_CACHES, request, deadline)
        found += [KeyCacheInfo.from_wire(cache) for cache in answer.key_caches]
        token = answer.next_page_token
        if not token:
            return found


def delete_key_cache(env: Environment, cache_id: str, timeout_s: float | None) -> Operation[None]:
    """Drop a cache. NOT_FOUND after a failed attempt is success: that attempt did it."""
    deadline = env.deadline(timeout_s)
    retrier = env.retrier(deadline)
    request = key_cache_pb2.DeleteKeyCacheRequest(key_cache_id=cache_id)
    while True:
        try:
            yield Call(contract.DELETE_KEY_CACHE, request, deadline.remaining_s())
            return
        except NotFoundError:
            if not retrier.failures:
                raise
            return
        except StreamIndexError as error:
            yield Sleep(retrier.delay_s(error))


def truncate_keys(
    env: Environment,
    info: KeyCacheInfo,
    keys: int,
    layer: int | None,
    window_rows: int | None,
    timeout_s: float | None,
) -> Operation[KeyCacheInfo]:
    """Shorten a layer, or all."""
    request = key_cache_pb2.TruncateKeysRequest(key_cache_id=info.id, keys=unsigned("keys", keys, 64))
    if layer is not None:
        request.layer = check_layer(layer, info.spec)
    if window_rows is not None:
        request.window_rows = unsigned("window_rows", window_rows, 64)
    answer = yield from unary(env, contract.TRUNCATE_KEYS, request, env.deadline(timeout_s))
    return KeyCacheInfo.from_wire(answer.key_cache)


def fork_key_cache(
    env: Environment, info: KeyCacheInfo, keys: int | None, window_rows: int | None, timeout_s: float | None
) -> Operation[KeyCacheInfo]:
    """Make a cache that shares rows. Not idempotent: tried again only where the server offers it."""
    request = key_cache_pb2.ForkKeyCacheRequest(key_cache_id=info.id)
    if keys is not None:
        request.keys = unsigned("keys", keys, 64)
    if window_rows is not None:
        request.window_rows = unsigned("window_rows", window_rows, 64)
    answer = yield from unary(env, contract.FORK_KEY_CACHE, request, env.deadline(timeout_s), idempotent=False)
    return KeyCacheInfo.from_wire(answer.key_cache)


def query_upload(env: Environment, upload_id: str, timeout_s: float | None) -> Operation[UploadState]:
    """How far an upload has come."""
    request = key_cache_pb2.QueryUploadRequest(upload_id=upload_id)
    answer = yield from unary(env, contract.QUERY_UPLOAD, request, env.deadline(timeout_s))
    return UploadState(answer.row_offset, answer.committed)


def capabilities(env: Environment, timeout_s: float | None) -> Operation[Capabilities]:
    """Limits, formats and implementations."""
    request = server_pb2.GetCapabilitiesRequest()
    return Capabilities.from_wire((yield from unary(env, contract.GET_CAPABILITIES, request, env.deadline(timeout_s))))


def load(env: Environment, timeout_s: float | None) -> Operation[Load]:
    """Ledgers, queue and caches."""
    request = server_pb2.GetLoadRequest()
    return Load.from_wire((yield from unary(env, contract.GET_LOAD, request, env.deadline(timeout_s))))


def wait_ready(env: Environment, timeout_s: float) -> Operation[None]:
    """Until searches are admitted. Raises DeadlineError, caused by the last UnavailableError if there was one."""
    deadline = env.deadline(timeout_s)
    policy = env.options.retry
    pause_s = policy.initial_s
    last: StreamIndexError | None = None
    try:
        while True:
            try:
                answer = yield Call(contract.GET_LOAD, server_pb2.GetLoadRequest(), deadline.remaining_s())
                if answer.ready:
                    return
            except UnavailableError as error:
                last = error
            yield Sleep(min(pause_s, deadline.remaining_s() or pause_s))
            pause_s = min(pause_s * policy.multiplier, 1.0, policy.max_s)
    except DeadlineError as error:
        raise DeadlineError(f"the service was not ready within {timeout_s} s") from last or error


def search_batch(env: Environment, batch: BatchRequest, timeout_s: float | None) -> Operation[list[BatchResult]]:
    """A ragged decode step; safe to repeat, as rows are written at an index."""
    answer = yield from unary(env, contract.SEARCH_BATCH, batch.message, env.deadline(timeout_s))
    return batch.results(answer)


def sparse_attend_batch(
    env: Environment, batch: AttendBatchRequest, timeout_s: float | None
) -> Operation[list[AttendBatchResult]]:
    """A ragged decode step of attention; safe to repeat, as it writes nothing."""
    answer = yield from unary(env, contract.SPARSE_ATTEND_BATCH, batch.message, env.deadline(timeout_s))
    return batch.results(answer)


def search(env: Environment, session: SearchSession, timeout_s: float | None) -> Operation[None]:
    """Emits the parts of the answer; a broken stream is followed by one for the rows not answered."""
    return _rows(env, contract.SEARCH, session, timeout_s, None)


def sparse_attend(
    env: Environment,
    session: AttendSession,
    timeout_s: float | None,
    progress: Callable[[int, int], object] | None = None,
) -> Operation[None]:
    """The same of attention; `progress` is told the rows answered, and those that there are, 0 when unknown."""
    return _rows(env, contract.SPARSE_ATTEND, session, timeout_s, progress)


def _rows(
    env: Environment,
    method: contract.Method,
    session: RowSession,
    timeout_s: float | None,
    progress: Callable[[int, int], object] | None,
) -> Operation[None]:
    total = session.header.row_count
    deadline = env.deadline(timeout_s)
    retrier = env.retrier(deadline)
    while True:
        try:
            session.begin()
            yield Open(method, session, deadline.remaining_s())
            while not session.done:
                part = session.receive((yield Read()))
                if part is not None:
                    retrier.progress()
                    if progress is not None:
                        yield Notify(progress, session.answered_rows, total)
                    yield Emit(part)
        except StreamIndexError as error:
            yield Close()
            if session.complete:  # only the last word was lost
                return
            yield Sleep(retrier.delay_s(error))
        else:
            yield from _drain()
            return


def append_keys(
    env: Environment,
    info: KeyCacheInfo,
    *,
    layer: int,
    kind: RowKind,
    rows: KeyRows,
    first_row: int | None,
    progress: Callable[[int, int], object] | None,
    resume_upload_id: str | None,
    timeout_s: float | None,
) -> Operation[int]:
    """Write rows of one kind; its length in the layer afterwards. A broken stream is resumed at the rows that the
    server holds."""
    check_layer(layer, info.spec)
    deadline = env.deadline(timeout_s)
    if not rows.count or (first_row is None and not resume_upload_id):
        request = key_cache_pb2.GetKeyCacheRequest(key_cache_id=info.id)
        answer = yield from unary(env, contract.GET_KEY_CACHE, request, deadline)
        first_row = KeyCacheInfo.from_wire(answer.key_cache).lengths(kind)[layer]
        if not rows.count:
            return first_row
    start = upload_start(info, layer, first_row or 0, rows.count, kind)
    session = UploadSession(start, rows, env.options.chunk_bytes, resume_upload_id or "")
    try:
        yield from _upload(env, session, deadline, progress)
    except StreamIndexError as error:
        if session.upload_id:
            error.metadata.setdefault("upload_id", session.upload_id)
        raise
    if session.layer_keys is None:  # the commit was seen by QueryUpload, which does not tell the length
        request = key_cache_pb2.GetKeyCacheRequest(key_cache_id=info.id)
        answer = yield from unary(env, contract.GET_KEY_CACHE, request, deadline)
        return KeyCacheInfo.from_wire(answer.key_cache).lengths(kind)[layer]
    return session.layer_keys


def _upload(
    env: Environment, session: UploadSession, deadline: Deadline, progress: Callable[[int, int], object] | None
) -> Operation[None]:
    retrier = env.retrier(deadline)
    told = -1
    while True:
        try:
            if session.upload_id:
                request = key_cache_pb2.QueryUploadRequest(upload_id=session.upload_id)
                state = yield Call(contract.QUERY_UPLOAD, request, deadline.remaining_s())
                if state.committed:
                    if progress is not None:
                        yield Notify(progress, session.total, session.total)
                    return
            session.begin()
            yield Open(contract.APPEND_KEYS, session, deadline.remaining_s())
            while session.layer_keys is None:
                session.receive((yield Read()))
                if session.acknowledged > told:
                    told = session.acknowledged
                    retrier.progress()
                    if progress is not None:
                        yield Notify(progress, told, session.total)
        except StreamIndexError as error:
            yield Close()
            yield Sleep(retrier.delay_s(error))
        else:
            yield from _drain()
            return


def _drain() -> Operation[None]:
    """Take the status of a stream whose last message has come; by then it cannot change the outcome."""
    try:
        while (yield Read()) is not None:
            pass
    except StreamIndexError:
        pass
    yield Close()
