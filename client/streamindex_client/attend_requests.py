"""From a caller's arguments to a checked call of attention. Everything here raises InputError, before any call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from streamindex.v1 import attention_pb2

from streamindex_client.attend import AttendBlock, AttendSession
from streamindex_client.errors import InputError
from streamindex_client.formats import Priority, member
from streamindex_client.requests import check_iterator, check_layer, place_rows
from streamindex_client.tensors import (
    bf16_maker_like,
    float_rows,
    index_rows,
    is_tensor,
    maker_like,
    position_rows,
    unsigned,
)

if TYPE_CHECKING:
    from streamindex_client.model import KeyCacheInfo, KeyCacheSpec, KvSpec
    from streamindex_client.retry import Environment

__all__ = ["AttendForm", "AttendSource", "attend_source", "check_attended", "finite", "index_width", "sink_logits"]

_BF16 = ("bfloat16", "uint16")


@dataclass(frozen=True, slots=True)
class AttendSource:
    """A session, and the iterator that feeds it (None when it already holds all queries)."""

    session: AttendSession
    blocks: Any


@dataclass(frozen=True, slots=True)
class AttendForm:
    """What rows of a call consist of: with a `searched` call index queries, else `width` indices, None for none."""

    spec: KeyCacheSpec
    searched: bool
    width: int | None
    explicit: bool

    @property
    def wanted(self) -> str:
        """A chunk of an iterator, for messages."""
        return "(" + ", ".join(["q", *self._others, *["positions"] * self.explicit]) + ")"

    @property
    def _others(self) -> tuple[str, ...]:
        """What comes with q."""
        if self.searched:
            return "index_q", "index_w"
        return () if self.width is None else ("indices",)

    def check_search(self, index_q: Any, index_w: Any) -> None:
        """That a search's tensors are there exactly where it is made. Raises InputError."""
        for name, tensor in (("index_q", index_q), ("index_w", index_w)):
            if (tensor is None) == self.searched:
                raise InputError(name, "is required with top_k" if self.searched else "is not used without top_k")

    def block(self, q: Any, index_q: Any, index_w: Any, indices: Any, positions: Any) -> AttendBlock:
        """Check the tensors of some rows."""
        spec, kv = self.spec, self.spec.kv
        assert kv is not None
        rows = float_rows("q", q, (None, kv.heads, kv.key_dim), _BF16, "rows heads key_dim")
        found_q = found_w = found = None
        if self.searched:
            shape = (rows.count, spec.heads, spec.head_dim)
            found_q = float_rows("index_q", index_q, shape, spec.key_format.dtype_names, "rows heads head_dim")
            found_w = float_rows("index_w", index_w, (rows.count, spec.heads), ("float32",), "rows heads")
        elif self.width is not None:
            found = index_rows("indices", indices, rows.count, self.width)
        position = None if positions is None else position_rows("positions", positions, rows.count)
        return AttendBlock((rows, found_q, found_w, found, position), maker_like(q), bf16_maker_like(q))

    def chunk(self, chunk: Any) -> AttendBlock:
        """Check what the caller's iterator gave."""
        names = ("q", *self._others, *["positions"] * self.explicit)
        if not isinstance(chunk, tuple | list) or len(chunk) != len(names):
            raise InputError("q", f"a chunk of the iterator is not {self.wanted}")
        given = dict(zip(names, chunk, strict=True))
        return self.block(*(given.get(name) for name in ("q", "index_q", "index_w", "indices", "positions")))


def attend_source(
    env: Environment,
    info: KeyCacheInfo,
    *,
    layer: int,
    q: Any,
    index_q: Any,
    index_w: Any,
    top_k: int | None,
    indices: Any,
    all_visible: bool = False,
    start_position: int | None,
    positions: Any,
    window: int,
    scale: float,
    sink: Any,
    want_lse: bool,
    priority: Priority | str | None,
    convention: str | None,
) -> AttendSource:
    """A session for tensors, or for an iterator of chunks."""
    spec = info.spec
    kv = check_attended(spec)
    if (top_k is not None) + (indices is not None) + bool(all_visible) != 1:
        raise InputError("top_k", "give top_k, indices or all_visible")
    header = attention_pb2.SparseAttendHeader(
        key_cache_id=info.id,
        layer=check_layer(layer, spec),
        query_format=spec.key_format.wire,
        convention=spec.convention if convention is None else convention,
        window=unsigned("window", window, 32),
        scale=finite("scale", scale),
        sink=sink_logits(sink, kv.heads),
        want_lse=bool(want_lse),
        request_key=env.new_key(),
    )
    if priority is not None:
        header.priority = member(Priority, "priority", priority).wire
    place_rows(header, q, start_position, positions)
    width = None
    if top_k is not None:
        header.top_k = unsigned("top_k", top_k, 31, 1)
    elif all_visible:
        header.all_visible = True
    else:
        width = header.given_indices = index_width(indices, is_tensor(q))
    form = AttendForm(spec, top_k is not None, width, start_position is None)
    session = AttendSession(header, env.options, form.chunk, kv.heads, kv.value_dim)
    if is_tensor(q):
        form.check_search(index_q, index_w)
        block = form.block(q, index_q, index_w, indices, positions)
        header.row_count = block.count
        session.take_all(block)
        return AttendSource(session, None)
    for name, tensor in (("index_q", index_q), ("index_w", index_w), ("positions", positions)):
        if tensor is not None:
            raise InputError(name, "comes inside the chunks when q is an iterator of them")
    check_iterator(q, form.wanted)
    return AttendSource(session, q)


def index_width(indices: Any, all_at_once: bool) -> int:
    """Indices of a row: of the tensor, or the number itself where q is an iterator."""
    if not all_at_once:
        return unsigned("indices", indices, 31)
    shape = getattr(indices, "shape", None)
    if shape is None or len(shape) != 2:
        raise InputError("indices", f"got {type(indices).__name__}, expected a tensor [rows, entries]")
    return int(shape[1])


def check_attended(spec: KeyCacheSpec) -> KvSpec:
    """The form of its KV rows, if a cache has such. Raises InputError."""
    if spec.kv is None:
        raise InputError("q", "the cache holds index keys alone: it was made without kv")
    return spec.kv


def finite(argument: str, value: float) -> float:
    """A number that is one. Raises InputError."""
    if not math.isfinite(value):
        raise InputError(argument, f"got {value}, expected a finite number")
    return value


def sink_logits(sink: Any, heads: int | None) -> list[float]:
    """[heads] float32, or None for none; `heads` None: any number. Raises InputError."""
    if sink is None:
        return []
    values = np.asarray(sink.detach().cpu() if hasattr(sink, "detach") else sink, dtype=np.float32)
    if values.ndim != 1 or (heads is not None and len(values) != heads):
        wanted = "any" if heads is None else str(heads)
        raise InputError("sink", f"has shape {list(values.shape)}, expected [heads] = [{wanted}]")
    if np.isnan(values).any():
        raise InputError("sink", "holds a NaN")
    found: list[float] = values.tolist()
    return found
