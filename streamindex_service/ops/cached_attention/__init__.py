"""Sparse attention over the rows of a cache: a window of recent rows, and compressed rows that indices name."""

from streamindex_service.ops.cached_attention.api import (
    ATTENTION_TERMS,
    AttentionTerms,
    attend_cached,
)
from streamindex_service.ops.cached_attention.copies import CachedSequence
from streamindex_service.ops.cached_attention.gather import GATHERS, gather_rows

__all__ = [
    "ATTENTION_TERMS",
    "GATHERS",
    "AttentionTerms",
    "CachedSequence",
    "attend_cached",
    "gather_rows",
]
