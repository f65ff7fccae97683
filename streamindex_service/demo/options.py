"""What a demo is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

REAL_KEYS, REAL_QUERIES, REAL_HEADS, REAL_HEAD_DIM = 16_384, 256, 64, 128
_DEFAULT_KEYS, _DEFAULT_QUERIES = 16_384, 1024
_PIPELINE_KEYS, _PIPELINE_QUERIES = 2048, 128  # attention is slow on a laptop
_PIPELINE_RATIO = 4


class DemoError(Exception):
    """The demo cannot do what it was asked to."""


@dataclass(frozen=True)
class DemoOptions:
    """Sizes and choices. `keys` and `queries` None: all of the real data, or a size that a laptop bears.

    `pipeline`: index, then attention, on synthetic data, with `attention_heads` heads and `window` tokens of a window.
    `ratio` None: 4 of a pipeline, else 1.

    Raises DemoError when the real data set is asked for what it does not hold.
    """

    keys: int | None = None
    queries: int | None = None
    synthetic: bool = False
    top_k: int = 512
    ratio: int | None = None
    heads: int = REAL_HEADS
    head_dim: int = REAL_HEAD_DIM
    key_format: str = "bf16"
    seed: int = 0
    device: str = "auto"
    implementation: str = ""
    as_json: bool = False
    pipeline: bool = False
    attention_heads: int = 64
    window: int = 128
    kv_format: str = "bf16"

    def __post_init__(self) -> None:
        if self.synthetic or self.pipeline:
            return
        if (self.tokens_per_key, self.heads, self.head_dim) != (1, REAL_HEADS, REAL_HEAD_DIM):
            raise DemoError("the data set has ratio 1, 64 heads and head_dim 128; add --synthetic for another shape")
        if self.key_count > REAL_KEYS or self.query_count > REAL_QUERIES:
            raise DemoError(f"the data set has {REAL_KEYS:,} keys and {REAL_QUERIES} queries; add --synthetic for more")

    @property
    def tokens_per_key(self) -> int:
        """The ratio."""
        return self.ratio or (_PIPELINE_RATIO if self.pipeline else 1)

    @property
    def key_count(self) -> int:
        """Keys to upload."""
        if self.pipeline:
            return self.keys or _PIPELINE_KEYS
        return self.keys or (_DEFAULT_KEYS if self.synthetic else REAL_KEYS)

    @property
    def query_count(self) -> int:
        """Query rows to search."""
        if self.pipeline:
            return self.queries or _PIPELINE_QUERIES
        return self.queries or (_DEFAULT_QUERIES if self.synthetic else REAL_QUERIES)
