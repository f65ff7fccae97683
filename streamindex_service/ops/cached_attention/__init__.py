"""Sparse attention over the rows of a cache: a window of recent rows, and compressed rows that indices name."""

from streamindex_service.ops.cached_attention.api import (
    ATTENTION_TERMS,
    AttentionTerms,
    attend_cached,
)
from streamindex_service.ops.cached_attention.gather import gather_rows
from streamindex_service.ops.cached_attention.sequences import AllVisible, CachedSequence

__all__ = [
    "ATTENTION_TERMS",
    "AllVisible",
    "AttentionTerms",
    "CachedSequence",
    "attend_cached",
    "gather_rows",
]
