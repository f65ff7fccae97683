"""Tensors of small integers, which every format holds exactly, and the answer that a search must give."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from streamindex.v1 import key_cache_pb2, types_pb2

BF16, FP16, FP32, FP8 = (
    types_pb2.KEY_FORMAT_BF16,
    types_pb2.KEY_FORMAT_FP16,
    types_pb2.KEY_FORMAT_FP32,
    types_pb2.KEY_FORMAT_FP8_E4M3,
)
_FP8_MAGNITUDES = np.array([0x00, 0x38, 0x40, 0x44, 0x48], np.uint8)  # 0 to 4


@dataclass(frozen=True)
class Kind:
    """What a cache is."""

    heads: int = 3
    head_dim: int = 32
    ratio: int = 1
    key_format: int = BF16
    layers: int = 1
    convention: str = ""

    @property
    def row_bytes(self) -> int:
        return self.head_dim * {BF16: 2, FP16: 2, FP32: 4, FP8: 1}[self.key_format]

    @property
    def has_scales(self) -> bool:
        return self.key_format == FP8

    def spec(self, **others) -> key_cache_pb2.KeyCacheSpec:
        return key_cache_pb2.KeyCacheSpec(
            heads=self.heads,
            head_dim=self.head_dim,
            ratio=self.ratio,
            key_format=self.key_format,
            layers=self.layers,
            convention=self.convention,
            **others,
        )


def encode(values: np.ndarray, key_format: int) -> bytes:
    """Integers from -4 to 4 in a format."""
    if key_format == BF16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    if key_format == FP16:
        return values.astype("<f2").tobytes()
    if key_format == FP32:
        return values.astype("<f4").tobytes()
    return (_FP8_MAGNITUDES[np.abs(values)] | np.where(values < 0, 0x80, 0).astype(np.uint8)).tobytes()


@dataclass
class Keys:
    """Key rows. values: [rows, head_dim] int8; scales: [rows] float32, powers of two, all 1 where there are none."""

    values: np.ndarray
    scales: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> Keys:
        return Keys(self.values[rows], self.scales[rows])

    def __add__(self, other: Keys) -> Keys:
        return Keys(np.concatenate([self.values, other.values]), np.concatenate([self.scales, other.scales]))

    def key_bytes(self, kind: Kind) -> bytes:
        return encode(self.values, kind.key_format)

    def scale_bytes(self, kind: Kind) -> bytes:
        return self.scales.astype("<f4").tobytes() if kind.has_scales else b""


@dataclass
class Queries:
    """Query rows. q: [rows, heads, head_dim] int8; w: [rows, heads] float32; positions: [rows] int64."""

    q: np.ndarray
    w: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.q)


class Draw:
    """Seeded tensors."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def keys(self, kind: Kind, rows: int) -> Keys:
        values = self.random.integers(-2, 3, (rows, kind.head_dim)).astype(np.int8)
        scales = np.float32(2.0) ** self.random.integers(-2, 3, rows) if kind.has_scales else np.ones(rows)
        return Keys(values, scales.astype(np.float32))

    def queries(self, kind: Kind, rows: int, start_position: int = 0) -> Queries:
        q = self.random.integers(-2, 3, (rows, kind.heads, kind.head_dim)).astype(np.int8)
        w = self.random.integers(-3, 4, (rows, kind.heads)).astype(np.float32)
        return Queries(q, w, np.arange(start_position, start_position + rows, dtype=np.int64))


def no_keys(kind: Kind) -> Keys:
    return Keys(np.zeros((0, kind.head_dim), np.int8), np.zeros(0, np.float32))


def expected(
    kind: Kind, keys: Keys, queries: Queries, top_k: int, by_index: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """indices [rows, top_k] int32 and scores [rows, top_k] float32: everything scored, then sorted."""
    dots = np.einsum("rhd,kd->rhk", queries.q.astype(np.float64), keys.values.astype(np.float64))
    scores = np.einsum("rhk,rh->rk", np.maximum(dots, 0), queries.w.astype(np.float64)) * keys.scales
    indices = np.full((len(queries), top_k), -1, np.int32)
    found = np.full((len(queries), top_k), -np.inf, np.float32)
    for row, position in enumerate(queries.positions):
        visible = min((int(position) + 1) // kind.ratio, len(keys))
        order = np.lexsort((np.arange(visible), -scores[row, :visible]))[:top_k]
        order = np.sort(order) if by_index else order
        indices[row, : len(order)] = order
        found[row, : len(order)] = scores[row, order]
    return indices, found


@dataclass
class ModelCache:
    """A cache as plain arrays."""

    kind: Kind
    layers: list[Keys] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = self.layers or [no_keys(self.kind) for _ in range(self.kind.layers)]

    def write(self, layer: int, first_row: int, rows: Keys) -> None:
        old = self.layers[layer]
        assert first_row <= len(old)
        self.layers[layer] = old[:first_row] + rows + old[first_row + len(rows) :]

    def truncate(self, keys: int, layer: int | None) -> None:
        for index in range(len(self.layers)) if layer is None else [layer]:
            self.layers[index] = self.layers[index][:keys]

    def fork(self, keys: int | None) -> ModelCache:
        return ModelCache(self.kind, [rows[: len(rows) if keys is None else keys] for rows in self.layers])
