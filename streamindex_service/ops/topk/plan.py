"""Tiles and workspace of a top-k run: pure arithmetic, so that a scheduler can ask before it reserves.

Bytes here are the workspace alone: inputs (q, w, keys, positions) and outputs are the caller's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

PAGE_KEYS = 256
HOPPER_GROUP = 512
MIN_WORKSPACE_BYTES = 16 << 20

# Allocators round every tensor up; this covers the rounding and the few small tensors (positions, ranges).
_SLACK_BYTES = 1 << 20
# More rows in a chunk buy no more reuse of a key tile, and cost causal tiles that only its last rows see.
_MAX_QUERY_CHUNK = 8192
# Fewer rows than this in a chunk would re-read every key too often: split the keys instead.
_FULL_WIDTH_ROWS = 128
_TILED_ROWS = 256
_ROW_STEP = 8
# torch.sort by score: sorted values and int64 permutation, with the sort's own double buffers.
_SORT_BYTES_PER_ENTRY = 48
_LIST_BYTES_PER_ENTRY = 8  # float32 score, int32 index


@dataclass(frozen=True)
class KernelTiles:
    """Compile-time shape of the fused score kernel and of the selection kernel.

    A score block is [block_keys, block_queries × heads_pad]; one program holds its keys and walks over `query_group`
    queries. They depend on (format, heads, head_dim) alone, never on a length, so that no request compiles anything
    new and a score is the same sequence of operations in every request.
    """

    block_keys: int
    block_queries: int
    heads_pad: int
    dim_pad: int
    query_group: int
    score_warps: int
    score_stages: int
    select_block: int
    select_warps: int
    filter_keys: int  # tiles of at least so many keys are filtered by a sampled threshold before the selection
    sample_every: int  # one line of 32 scores in so many is sampled


@dataclass(frozen=True)
class Plan:
    """One run's tiles: rows of a query chunk, keys of a key tile (a multiple of 256), and the peak workspace in
    bytes."""

    query_chunk: int
    key_tile: int
    workspace_bytes: int
    tiles: KernelTiles | None = None


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


def plan_triton(shape: Shape, workspace_bytes: int) -> Plan:
    """Tiles of the fused kernels. Raises WorkspaceTooSmallError below 16 MiB."""
    tiles = kernel_tiles(shape.format_name, shape.heads, shape.head_dim)
    return replace(_fit(shape, workspace_bytes, triton_workspace_bytes), tiles=tiles)


def plan_chunked(shape: Shape, workspace_bytes: int, *, on_cuda: bool) -> Plan:
    """Tiles of the torch implementation. Raises WorkspaceTooSmallError below 16 MiB."""
    return _fit(shape, workspace_bytes, chunked_cuda_workspace_bytes if on_cuda else chunked_cpu_workspace_bytes)


def triton_workspace_bytes(shape: Shape, query_chunk: int, key_tile: int) -> int:
    """Peak bytes of the fused kernels: scores of a chunk × tile, two candidate lists, survivors, and the final sort."""
    lists = 2 * shape.top_k + survivor_capacity(shape.top_k)
    per_row = 4 * key_tile + lists * _LIST_BYTES_PER_ENTRY + shape.top_k * _SORT_BYTES_PER_ENTRY + 4
    return query_chunk * per_row + _SLACK_BYTES


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
    rows = max(1, min(shape.rows, _MAX_QUERY_CHUNK))
    all_keys = _round_up(max(shape.keys, 1), PAGE_KEYS)
    if cost(shape, min(rows, _FULL_WIDTH_ROWS), all_keys) <= workspace_bytes:
        chunk, tile = _largest(rows, lambda n: cost(shape, n, all_keys) <= workspace_bytes), all_keys
    else:
        # a square-ish block: the smallest tile first decides the rows, then the tile takes what is left
        chunk = _largest(min(rows, _TILED_ROWS), lambda n: cost(shape, n, 4 * PAGE_KEYS) <= workspace_bytes)
        pages = _largest(all_keys // PAGE_KEYS, lambda n: cost(shape, chunk, n * PAGE_KEYS) <= workspace_bytes)
        tile = pages * PAGE_KEYS
    if chunk > _ROW_STEP and chunk < rows:
        chunk -= chunk % _ROW_STEP
    bytes_needed = cost(shape, chunk, tile)
    if bytes_needed > workspace_bytes:
        raise WorkspaceTooSmallError(workspace_bytes, bytes_needed)
    return Plan(chunk, tile, bytes_needed)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 1..most that fits, at least 1, for a cost that grows with n."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def survivor_capacity(top_k: int) -> int:
    """Entries of a row that the filter may leave to the selection; more, and the selection reads the whole row."""
    return max(1024, 4 * top_k)


def kernel_tiles(format_name: str, heads: int, head_dim: int) -> KernelTiles:
    """The static table of kernel shapes, measured on an H200 at 64 × 128; other sizes follow from what fits a
    multiprocessor."""
    heads_pad = max(16, _power_of_two(heads))
    dim_pad = max(32, _power_of_two(head_dim))  # the e4m3 matrix unit takes 32 elements at a time
    wide = format_name == "fp32"
    if wide:  # no matrix unit without rounding: small tiles, for correctness only
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
        query_group=128,
        score_warps=warps,
        score_stages=stages,
        select_block=2048,
        select_warps=8,
        filter_keys=16_384,
        sample_every=16,
    )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
