"""What a demo is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

REAL_KEYS, REAL_QUERIES, REAL_HEADS, REAL_HEAD_DIM = 16_384, 256, 64, 128
_DEFAULT_KEYS, _DEFAULT_QUERIES = 16_384, 1024


class DemoError(Exception):
    """The demo cannot do what it was asked to."""


@dataclass(frozen=True)
class DemoOptions:
    """Sizes and choices. `keys` and `queries` None: all of the real data, or a size that a laptop bears.

    Raises DemoError when the real data set is asked for what it does not hold.
    """

    keys: int | None = None
    queries: int | None = None
    synthetic: bool = False
    top_k: int = 512
    ratio: int = 1
    heads: int = REAL_HEADS
    head_dim: int = REAL_HEAD_DIM
    key_format: str = "bf16"
    seed: int = 0
    device: str = "auto"
    implementation: str = ""
    as_json: bool = False

    def __post_init__(self) -> None:
        if self.synthetic:
            return
        if (self.ratio, self.heads, self.head_dim) != (1, REAL_HEADS, REAL_HEAD_DIM):
            raise DemoError("the data set has ratio 1, 64 heads and head_dim 128; add --synthetic for another shape")
        if self.key_count > REAL_KEYS or self.query_count > REAL_QUERIES:
            raise DemoError(f"the data set has {REAL_KEYS:,} keys and {REAL_QUERIES} queries; add --synthetic for more")

    @property
    def key_count(self) -> int:
        """Keys to upload."""
        return self.keys or (_DEFAULT_KEYS if self.synthetic else REAL_KEYS)

    @property
    def query_count(self) -> int:
        """Query rows to search."""
        return self.queries or (_DEFAULT_QUERIES if self.synthetic else REAL_QUERIES)
