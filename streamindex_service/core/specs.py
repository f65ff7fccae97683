"""What a cache is: fixed when it is made."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property

from streamindex_service.core.sizes import KeyFormat, KvFormat, RowForm


class RowKind(enum.IntEnum):
    """Which rows of a layer, with the numbers of `streamindex.v1.RowKind`: each kind has a length and pages of its own.

    KEYS: index keys, which searches score. KV: of each index key, the row that attention reads. WINDOW: of each token.
    """

    KEYS = 1
    KV = 2
    WINDOW = 3


_KEYS_ALONE, _ALL_KINDS = (RowKind.KEYS,), tuple(RowKind)


@dataclass(frozen=True)
class KvSpec:
    """KV rows and window rows of a cache, and who reads them: `heads` query heads of attention."""

    kv_format: KvFormat
    key_dim: int
    value_dim: int
    heads: int

    @cached_property
    def form(self) -> RowForm:
        """How its rows lie in a page."""
        return RowForm.of_kv(self.kv_format, self.key_dim)


@dataclass(frozen=True)
class CacheSpec:
    """What a cache is; fixed for its life. `kv` is None where it holds index keys alone."""

    heads: int
    head_dim: int
    ratio: int
    key_format: KeyFormat
    layers: int
    convention: str
    expected_keys: int
    idle_ttl_s: float
    priority: int
    kv: KvSpec | None = None

    @cached_property
    def key_form(self) -> RowForm:
        """How its index keys lie in a page."""
        return RowForm.of_keys(self.key_format, self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of this cache's index keys."""
        return self.key_form.page_bytes

    @property
    def kinds(self) -> tuple[RowKind, ...]:
        """Kinds of rows that its layers have."""
        return _KEYS_ALONE if self.kv is None else _ALL_KINDS

    def form(self, kind: RowKind) -> RowForm:
        """How rows of a kind lie in a page."""
        if kind is RowKind.KEYS:
            return self.key_form
        assert self.kv is not None, "the cache holds index keys alone"
        return self.kv.form

    def window_rows_of(self, keys: int) -> int:
        """The most tokens of which so many keys are the whole keys."""
        return (keys + 1) * self.ratio - 1
