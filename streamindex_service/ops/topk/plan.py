"""Tiles and workspace of a top-k run: pure arithmetic, so that a scheduler can ask before it reserves.

Bytes here are the workspace alone: inputs (q, w, keys, positions) and outputs are the caller's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache

PAGE_KEYS = 256
MIN_WORKSPACE_BYTES = 16 << 20

# Allocators round every tensor up; this covers the rounding and the few small tensors (positions, ranges).
_SLACK_BYTES = 1 << 20
# More rows in a chunk buy no more reuse of a key tile, and cost causal tiles that only its last rows see.
MAX_QUERY_CHUNK = 8192
# Fewer rows than this in a chunk would re-read every key too often: split the keys instead.
_FULL_WIDTH_ROWS = 128
_TILED_ROWS = 256
_ROW_STEP = 8
_PART_ALIGNMENT = 256
_PARTS = 10  # of an arena
_MOST_HEADS, _MOST_HEAD_DIM = 128, 256
FILTERED_TOP_K = 4  # a row of fewer than so many times top_k keys is not filtered

# Queries that the multiprocessors read at a time: a third of the cache, beside the scores that pass through it.
HOPPER_SHARED_BYTES = 16 << 20
# What the Hopper kernel takes: stages of its ring (a power of two), by format; heads. Everything else keeps the
# portable kernel.
HOPPER_STAGES = {"fp8_e4m3": 8, "bf16": 4, "fp16": 4}
HOPPER_HEADS = frozenset({32, 64, 128})
HOPPER_HEAD_DIM = 128
HOPPER_CAPABILITY = (9, 0)


class ScoreKernel(StrEnum):
    """Which score kernel a plan takes: one for all chunks and tiles of every run of a (device, format, heads,
    head_dim)."""

    PORTABLE = "portable"
    HOPPER = "hopper"
    WITHOUT_GLUON = "portable, for this Triton lacks what the hopper kernel needs"


@dataclass(frozen=True)
class WorkspaceTerms:
    """The workspace of a run whose rows and keys are one chunk and one tile, in closed form: for whoever reserves
    memory and cannot ask for a plan. Never less than the plan's, and hardly more.

    Bytes of a run: `fixed_bytes`, and for each row `row_bytes`; for each (row, head, element of it)
    `row_element_bytes`; for each (row, entry of its answer) `row_entry_bytes`; for each (row, key) 1/32 of
    `row_key_32nds`; for each (row, key, head) `row_key_head_bytes`; for each key `key_bytes`, and `key_dim_bytes` for
    each of its elements. Rows that see at least `filter_keys` keys, and `filter_entries` for each entry, have a filter:
    `survivor_bytes` for each of `survivors` or of `entry_survivors` an entry, what is more, and `marked_row_bytes`, and
    1/32 of `marked_key_32nds` for each key.
    """

    fixed_bytes: int
    row_bytes: int = 0
    row_element_bytes: int = 0
    row_entry_bytes: int = 0
    row_key_32nds: int = 0
    row_key_head_bytes: int = 0
    key_bytes: int = 0
    key_dim_bytes: int = 0
    filter_keys: int = 0
    filter_entries: int = 0
    survivor_bytes: int = 0
    survivors: int = 0
    entry_survivors: int = 0
    marked_row_bytes: int = 0
    marked_key_32nds: int = 0


@dataclass(frozen=True)
class KernelTiles:
    """Compile-time shape of the score kernel and of the selection kernels.

    A score block is [block_keys, block_queries × heads_pad]; one program of the portable kernel holds its keys and
    walks over `query_group` queries. They depend on (format, heads, head_dim) alone, never on a length, so that no
    request compiles anything new and a score is the same sequence of operations in every request.
    """

    block_keys: int
    block_queries: int
    heads_pad: int
    dim_pad: int
    query_group: int
    score_warps: int
    score_stages: int
    select_lanes: int  # up to so many entries of a row, or twice as many, are selected in registers
    select_block: int
    select_warps: int
    filter_keys: int  # tiles of at least so many keys are filtered by a sampled threshold before the selection
    # Neighbours' scores are alike in real text, so short lines tell more: with 32 scores a line the sample misled 4 to
    # 6 rows in 100, with 8 one in 2,000. A line of 8 is what memory is read by.
    sample_line: int
    sample_every: int  # one line in so many is sampled, or fewer:
    sample_lanes: int  # the most scores of a sample
    mark_block: int
    collect_words: int  # marks, of 32 keys each, that are unpacked at a time
    rest_rows: int  # rows that one block looks through for what the filter left over
    score_kernel: ScoreKernel = ScoreKernel.PORTABLE


@dataclass(frozen=True)
class SurvivorLanes:
    """Compile-time shape of the selection among survivors: it holds `lanes` of them in registers, or `most_lanes`.

    registers: the most a thread may take, so that enough blocks run at a time; None where the compiler decides.
    ordered: results of a row that are put in order of score at a time, top_k of them used.
    """

    lanes: int
    most_lanes: int
    warps: int
    registers: int | None
    ordered: int


@dataclass(frozen=True)
class Plan:
    """One run's tiles: rows of a query chunk, keys of a key tile (a multiple of 256), and the peak workspace in
    bytes.

    grow: a chunk whose rows see fewer keys than the tile holds takes more rows, as many as fit the same workspace.
    """

    query_chunk: int
    key_tile: int
    workspace_bytes: int
    tiles: KernelTiles | None = None
    grow: bool = False

    @property
    def name(self) -> str:
        """Which kernels run: for logs and results."""
        return "torch" if self.tiles is None else f"triton, score kernel: {self.tiles.score_kernel.value}"


class WorkspaceTooSmallError(ValueError):
    """The workspace offered is below the floor at which any problem runs; attributes give both in bytes."""

    def __init__(self, offered_bytes: int, floor_bytes: int) -> None:
        super().__init__(f"workspace_bytes: {offered_bytes} offered, {floor_bytes} is the least")
        self.offered_bytes = offered_bytes
        self.floor_bytes = floor_bytes


@dataclass(frozen=True)
class Shape:
    """What a plan depends on. keys: the most keys that any row sees; element_bytes: of the key format."""

    rows: int
    heads: int
    head_dim: int
    keys: int
    top_k: int
    format_name: str
    element_bytes: int


@lru_cache(maxsize=256)
def plan_triton(shape: Shape, workspace_bytes: int, score_kernel: ScoreKernel = ScoreKernel.PORTABLE) -> Plan:
    """Tiles of the fused kernels. Raises WorkspaceTooSmallError below 16 MiB."""
    tiles = kernel_tiles(shape.format_name, shape.heads, shape.head_dim, score_kernel)
    return replace(_fit(shape, workspace_bytes, triton_workspace_bytes), tiles=tiles, grow=True)


def plan_chunked(shape: Shape, workspace_bytes: int, *, on_cuda: bool) -> Plan:
    """Tiles of the torch implementation. Raises WorkspaceTooSmallError below 16 MiB."""
    return _fit(shape, workspace_bytes, chunked_cuda_workspace_bytes if on_cuda else chunked_cpu_workspace_bytes)


def triton_workspace_bytes(shape: Shape, query_chunk: int, key_tile: int) -> int:
    """Peak bytes of the fused kernels: the arena of a chunk × tile."""
    tiles = kernel_tiles(shape.format_name, shape.heads, shape.head_dim)  # no score kernel changes a byte of it
    return arena_bytes(shape.top_k, query_chunk, key_tile, tiles) + _SLACK_BYTES


def triton_terms() -> WorkspaceTerms:
    """Of the fused kernels: what `arena_parts` adds up to."""
    tiles = kernel_tiles("bf16", 64, 128)  # nothing here depends on the format or the dimensions
    return WorkspaceTerms(
        fixed_bytes=4 * tiles.mark_block + _PARTS * _PART_ALIGNMENT + _SLACK_BYTES,
        row_entry_bytes=4 * 4,
        row_key_32nds=4 * 32,
        filter_keys=tiles.filter_keys,
        filter_entries=FILTERED_TOP_K,
        survivor_bytes=4 * 2,
        survivors=survivor_capacity(0),
        entry_survivors=survivor_capacity(1 << 20) >> 20,
        marked_row_bytes=4 * 2,
        marked_key_32nds=4,
    )


def chunked_terms(*, on_cuda: bool) -> WorkspaceTerms:
    """Of the torch implementation: what `chunked_cuda_workspace_bytes` and `chunked_cpu_workspace_bytes` say."""
    if on_cuda:
        return WorkspaceTerms(
            fixed_bytes=_SLACK_BYTES, row_element_bytes=4, row_entry_bytes=40, row_key_32nds=56 * 32,
            row_key_head_bytes=4, key_bytes=8, key_dim_bytes=8,
        )  # fmt: skip
    page = 4 * PAGE_KEYS * (_MOST_HEAD_DIM + _MOST_HEADS)
    return WorkspaceTerms(
        fixed_bytes=_SLACK_BYTES + page, row_bytes=4 * _MOST_HEADS, row_element_bytes=4, row_entry_bytes=40,
        row_key_32nds=56 * 32,
    )  # fmt: skip


def any_terms() -> WorkspaceTerms:
    """Of an implementation that has no plan: more than it is known to take."""
    return WorkspaceTerms(
        fixed_bytes=4 * _SLACK_BYTES, row_element_bytes=8, row_entry_bytes=64, row_key_32nds=64 * 32,
        row_key_head_bytes=4, key_dim_bytes=4,
    )  # fmt: skip


def arena_bytes(top_k: int, rows: int, stride: int, tiles: KernelTiles) -> int:
    """Bytes of all buffers of a chunk of `rows` rows and `stride` keys."""
    return sum(arena_parts(top_k, rows, stride, tiles))


def most_rows(top_k: int, stride: int, tiles: KernelTiles, size_bytes: int) -> int:
    """Rows of `stride` keys whose arena is at most so large, but for a few."""
    row_words = stride + 4 * top_k
    if is_filtered(stride, top_k, tiles):
        row_words += 2 * survivor_capacity(top_k) + stride // 32 + 2
    return (size_bytes - 4 * tiles.mark_block - _PARTS * _PART_ALIGNMENT) // (4 * row_words)


def arena_parts(top_k: int, rows: int, stride: int, tiles: KernelTiles) -> list[int]:
    """Bytes of each: scores (with a block more, read and not used), two candidate lists of scores and indices, and
    where the chunk is filtered survivors (scores, indices), marks, thresholds and counts; else nothing."""
    filtered = is_filtered(stride, top_k, tiles)
    entries, survivors = rows * top_k, rows * survivor_capacity(top_k) * filtered
    words = [
        rows * stride + tiles.mark_block, entries, entries, entries, entries,
        survivors, survivors, rows * stride // 32 * filtered, rows * filtered, rows * filtered,
    ]  # fmt: skip
    return [_round_up(4 * count, _PART_ALIGNMENT) for count in words]


def score_stride(width: int) -> int:
    """Floats from one row of scores to the next, where rows see `width` keys: whole pages."""
    return _round_up(max(width, 1), PAGE_KEYS)


def is_filtered(keys: int, top_k: int, tiles: KernelTiles) -> bool:
    """Whether a tile of so many keys is filtered before the selection."""
    return keys >= least_filtered(top_k, tiles)


def least_filtered(top_k: int, tiles: KernelTiles) -> int:
    """The fewest keys of a tile that is filtered."""
    return max(tiles.filter_keys, FILTERED_TOP_K * top_k)


def chunked_cpu_workspace_bytes(shape: Shape, query_chunk: int, key_tile: int) -> int:
    """Peak bytes of the CPU run: float32 queries, one page's products, scores, packed keys and their top-k."""
    page = 4 * PAGE_KEYS * (shape.head_dim + shape.heads)
    query = 4 * (shape.heads * shape.head_dim + _round_up(shape.heads, 16))
    # per key of a tile: score, its bits in order twice, packed and in torch.topk's own pairs; the list joins them
    per_row = query + 16 * key_tile + 40 * (key_tile + shape.top_k)
    return query_chunk * per_row + page + _SLACK_BYTES


def chunked_cuda_workspace_bytes(shape: Shape, query_chunk: int, key_tile: int) -> int:
    """Peak bytes of the CUDA run: products of every head [chunk × heads, tile] float32, the tile's keys, packed
    keys."""
    tile_keys = key_tile * (8 * shape.head_dim + 8)
    query = 4 * shape.heads * shape.head_dim
    per_row = query + 4 * shape.heads * key_tile + 16 * key_tile + 40 * (key_tile + shape.top_k)
    return query_chunk * per_row + tile_keys + _SLACK_BYTES


def _fit(shape: Shape, workspace_bytes: int, cost: Callable[[Shape, int, int], int]) -> Plan:
    """The largest chunk × tile whose cost fits: all keys in one tile while that leaves enough rows, else tiles of
    keys."""
    if workspace_bytes < MIN_WORKSPACE_BYTES:
        raise WorkspaceTooSmallError(workspace_bytes, MIN_WORKSPACE_BYTES)
    rows = max(1, min(shape.rows, MAX_QUERY_CHUNK))
    all_keys = _round_up(max(shape.keys, 1), PAGE_KEYS)
    if cost(shape, min(rows, _FULL_WIDTH_ROWS), all_keys) <= workspace_bytes:
        chunk, tile = largest(rows, lambda n: cost(shape, n, all_keys) <= workspace_bytes), all_keys
    else:
        # a square-ish block: the smallest tile first decides the rows, then the tile takes what is left
        chunk = largest(min(rows, _TILED_ROWS), lambda n: cost(shape, n, 4 * PAGE_KEYS) <= workspace_bytes)
        pages = largest(all_keys // PAGE_KEYS, lambda n: cost(shape, chunk, n * PAGE_KEYS) <= workspace_bytes)
        tile = pages * PAGE_KEYS
    if chunk > _ROW_STEP and chunk < rows:
        chunk -= chunk % _ROW_STEP
    bytes_needed = cost(shape, chunk, tile)
    if bytes_needed > workspace_bytes:
        raise WorkspaceTooSmallError(workspace_bytes, bytes_needed)
    return Plan(chunk, tile, bytes_needed)


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 1..most that fits, at least 1, for a cost that grows with n."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def survivor_capacity(top_k: int) -> int:
    """Entries of a row that the filter may leave to the selection; more, and the selection reads the whole row."""
    return max(1024, 6 * top_k)


@lru_cache(maxsize=16)
def survivor_lanes(top_k: int) -> SurvivorLanes:
    """The shape for a top_k: one of four, so few are ever compiled."""
    # the threshold lets through up to twice top_k, relatively fewer for a large one
    lanes = min(max(1024, _power_of_two(2 * top_k)), 8192)
    return SurvivorLanes(
        lanes,
        most_lanes=min(2 * lanes, 8192),
        warps=min(lanes // 256, 16),
        registers=80 if lanes == 1024 else None,
        ordered=lanes // 2,
    )


def choose_score_kernel(
    format_name: str, heads: int, head_dim: int, capability: tuple[int, int] | None, *, gluon: bool
) -> ScoreKernel:
    """The static choice: by device, format and dimensions, never by a length. capability: of a CUDA device, or
    None."""
    fits = format_name in HOPPER_STAGES and heads in HOPPER_HEADS and head_dim == HOPPER_HEAD_DIM
    if capability != HOPPER_CAPABILITY or not fits:
        return ScoreKernel.PORTABLE
    return ScoreKernel.HOPPER if gluon else ScoreKernel.WITHOUT_GLUON


@lru_cache(maxsize=256)
def kernel_tiles(
    format_name: str, heads: int, head_dim: int, score_kernel: ScoreKernel = ScoreKernel.PORTABLE
) -> KernelTiles:
    """The static table of kernel shapes, measured on an H200 at 64 × 128; other sizes follow from what fits a
    multiprocessor."""
    heads_pad = max(16, _power_of_two(heads))
    dim_pad = max(32, _power_of_two(head_dim))  # the e4m3 matrix unit takes 32 elements at a time
    group, wide = 128, format_name == "fp32"
    if score_kernel is ScoreKernel.HOPPER:
        block_keys, columns, warps, stages = 256, 128, 4, HOPPER_STAGES[format_name]
    elif wide:  # no matrix unit without rounding: small tiles, for correctness only
        block_keys, columns, warps, stages = 32, heads_pad, 8, 1
    elif heads_pad == 128 or dim_pad == 256:
        block_keys, columns, warps, stages = 128, max(heads_pad, 64), 4, 2
    else:
        block_keys, columns, warps, stages = 256, 64, 8, 3
    return KernelTiles(
        block_keys=block_keys,
        block_queries=columns // heads_pad,
        heads_pad=heads_pad,
        dim_pad=dim_pad,
        query_group=group,
        score_warps=warps,
        score_stages=stages,
        select_lanes=2048,
        select_block=2048,
        select_warps=4,
        filter_keys=2049,  # one more than select_lanes
        sample_line=8,
        sample_every=8,
        sample_lanes=4096,
        mark_block=2048,
        collect_words=1024,
        rest_rows=32,
        score_kernel=score_kernel,
    )


def shared_queries(rows: int, row_bytes: int) -> int:
    """Queries of a chunk that all multiprocessors work on at a time: equal parts of the chunk that stay in the cache
    while every block of keys passes by."""
    groups = max(1, -(-rows * row_bytes // HOPPER_SHARED_BYTES))
    return _round_up(-(-rows // groups), _ROW_STEP)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
