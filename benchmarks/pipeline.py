"""A layer's compressed sparse attention from end to end, composed of the service's operations: its inputs and caches,
the ways to compute it, and one run in query chunks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import Attention, AttentionModel
from benchmarks.compressor import Layer, Tokens, make_tokens
from benchmarks.harness import Model
from benchmarks.inputs import Prefill
from benchmarks.searches import MIB, reference_search, run_topk
from streamindex_service.demo.workload import quantise_keys
from streamindex_service.ops import KeyFormat, KvFormat, KvRows, PagedKeys
from streamindex_service.ops.compressor import CompressorState, compress
from streamindex_service.ops.index_rows import assemble_index_rows
from streamindex_service.ops.sparse_attention import Plan as AttentionPlan
from streamindex_service.ops.topk import Plan as TopkPlan

STAGES = ("compressor", "topk", "index rows", "attention")
CHUNK_TOKENS = 16_384
_LEAST_CHUNK_TOKENS = 2048
TOPK_WORKSPACE_BYTES = 256 * MIB
# of the tilings that topk_scaling tries, the one that it takes at every length
_CHUNKED_TOPK = TopkPlan(1024, 16_384, 0)
_CHUNKED_ATTENTION = AttentionPlan(0, token_chunk=512)
_FILL_ROWS = 8192


@dataclass(frozen=True)
class CsaLayer:
    """Inputs of a whole prefill of one layer, and the caches that its compressors fill.

    pooled, index_pooled: projections of the compressors of KV rows and of index keys. index_q: [tokens, heads,
    head_dim] in `key_format`; w: [tokens, heads] float32; q: [tokens, attention heads, key_dim] bf16.
    rows: [tokens + entries, key_dim] bf16, the window's rows and then room for the compressed ones; keys: [entries,
    head_dim] bf16, room for the index keys. sink: [attention heads] float32.
    """

    index: Model
    attention: AttentionModel
    key_format: KeyFormat
    pooled: Tokens
    index_pooled: Tokens
    index_q: Tensor
    w: Tensor
    q: Tensor
    rows: Tensor
    keys: Tensor
    sink: Tensor

    @property
    def tokens(self) -> int:
        return self.q.shape[0]

    @property
    def device(self) -> str:
        return self.q.device.type

    @cached_property
    def kv(self) -> KvRows:
        """Window and compressed rows, as attention gathers them."""
        return KvRows(KvFormat.BF16, self.rows)

    @property
    def index_flop(self) -> int:
        """Operations of the search: of every (token, key) pair that is seen."""
        return self.index.useful_flop(self.tokens)

    @property
    def attention_flop(self) -> int:
        """Operations of the attention: of every entry of an index row that names a row."""
        seen = torch.arange(1, self.tokens + 1)
        entries = seen.clamp(max=self.attention.window) + (seen // self.index.ratio).clamp(max=self.index.top_k)
        return self.attention.entry_flop * int(entries.sum())

    def compress(self, implementation: str) -> None:
        """Fill the compressed rows and the index keys."""
        for tokens, out in ((self.pooled, self.rows[self.tokens :]), (self.index_pooled, self.keys)):
            state = CompressorState.empty(tokens.weights)
            compress(tokens.kv, tokens.gate, tokens.weights, 0, state, implementation=implementation, out=out)

    def paged_keys(self) -> PagedKeys:
        """The index keys as they are searched, quantised if the format says so."""
        if self.key_format.has_scales:
            return PagedKeys.from_contiguous(*quantise_keys(self.keys.float()))
        return PagedKeys.from_contiguous(self.keys)

    def searched(self, keys: PagedKeys, rows: slice) -> Prefill:
        """Some of the search's rows."""
        return Prefill(self.index, self.index_q[rows], self.w[rows], keys, rows.start)

    def attended(self, indices: Tensor, rows: slice) -> Attention:
        """Attention of some of the tokens."""
        return Attention(self.attention, self.q[rows], self.kv, indices, self.sink)


def make_layer(index: Model, attention: AttentionModel, tokens: int, key_format: KeyFormat, device: str) -> CsaLayer:
    """Random inputs, drawn in parts, and caches that hold no number yet."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(dtype: torch.dtype, *shape: int) -> Tensor:
        whole = torch.empty(shape, dtype=dtype, device=device)
        for start in range(0, shape[0], _FILL_ROWS):
            part = whole[start : start + _FILL_ROWS]
            part.copy_(torch.randn(part.shape, generator=generator, device=device))
        return whole

    entries = tokens // index.ratio
    rows = normal(torch.bfloat16, tokens + entries, attention.key_dim)
    rows[tokens:] = torch.nan
    return CsaLayer(
        index=index,
        attention=attention,
        key_format=key_format,
        pooled=make_tokens(Layer("rows", index.ratio, attention.key_dim), tokens, torch.bfloat16, device, seed=1),
        index_pooled=make_tokens(Layer("keys", index.ratio, index.head_dim), tokens, torch.bfloat16, device, seed=2),
        index_q=normal(key_format.torch_dtype, tokens, index.heads, index.head_dim),
        w=normal(torch.float32, tokens, index.heads).mul_(index.head_dim**-0.5 * index.heads**-0.5),
        q=normal(torch.bfloat16, tokens, attention.heads, attention.key_dim),
        rows=rows,
        keys=torch.full((entries, index.head_dim), torch.nan, dtype=torch.bfloat16, device=device),
        sink=normal(torch.float32, attention.heads),
    )


@dataclass(frozen=True)
class Way:
    """One way to compute the layer. chunk: query tokens at a time. search and attend fill their last argument.
    compressor, assembly: names of implementations. overlapped: attention of a chunk runs on another stream than the
    search of the next."""

    name: str
    chunk: int
    compressor: str
    assembly: str
    search: Callable[[Prefill, Tensor], None]
    attend: Callable[[Attention, Tensor], None]
    overlapped: bool = False


def product_way(tokens: int, *, overlapped: bool, chunk: int | None = None) -> Way:
    """The product's kernels. What overlaps must be several chunks."""
    if chunk is None:
        chunk = min(CHUNK_TOKENS, max(tokens // 4, _LEAST_CHUNK_TOKENS)) if overlapped else CHUNK_TOKENS
    return Way(
        "triton, two streams" if overlapped else "triton",
        min(chunk, tokens),
        compressor="triton",
        assembly="triton",
        search=lambda prefill, out: run_topk(prefill, "triton", out, workspace_bytes=TOPK_WORKSPACE_BYTES),
        attend=lambda attention, out: attention.run("triton", out),
        overlapped=overlapped,
    )


def chunked_way(tokens: int) -> Way:
    """Chunks in torch: the StreamIndex search, then attention of rows gathered in float32."""
    return Way(
        "chunked",
        min(CHUNK_TOKENS, tokens),
        compressor="torch",
        assembly="reference",
        search=lambda prefill, out: run_topk(prefill, "chunked", out, plan=_CHUNKED_TOPK),
        attend=lambda attention, out: attention.run("chunked", out, _CHUNKED_ATTENTION),
    )


def materialised_way(tokens: int) -> Way:
    """Everything at once: all scores of all heads in memory, then all gathered rows and all logits."""
    return Way(
        "materialised",
        tokens,
        compressor="torch",
        assembly="reference",
        search=reference_search().work,
        attend=attend_materialised,
    )


def attend_materialised(attention: Attention, out: Tensor) -> None:
    """Fill `out` [tokens, heads, value_dim]: gathered rows in bf16, logits in float32, all of them in memory."""
    a = attention
    valid = (a.indices >= 0) & (a.indices < a.kv.rows)
    keys = a.kv.data[a.indices.long().masked_fill_(~valid, 0)]
    logits = _product(a.q, keys.mT).mul_(a.scale).masked_fill_(~valid[:, None, :], -torch.inf)
    largest = logits.amax(dim=2)
    if a.sink is not None:
        largest = torch.maximum(largest, a.sink)
    weights = logits.sub_(largest[:, :, None]).exp_()
    total = weights.sum(dim=2)
    if a.sink is not None:
        total += torch.exp(a.sink - largest)
    weights = weights.div_(total[:, :, None]).to(torch.bfloat16)
    del logits
    out.copy_(_product(weights, keys[:, :, : a.model.value_dim]))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product of bf16 tensors in float32."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


class StageClock:
    """How long each stage of a run on one stream took, between device events (on a CPU by the host's clock)."""

    def __init__(self, device: str) -> None:
        self._on_cuda = device != "cpu"
        self._spans: list[tuple[str, Any, Any]] = []  # events, or seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is started within belongs to the stage."""
        begin = self._now()
        yield
        self._spans.append((name, begin, self._now()))

    def seconds(self) -> dict[str, float]:
        """Of each stage, all chunks together; waits for the device."""
        total = dict.fromkeys(STAGES, 0.0)
        if self._on_cuda:
            torch.cuda.synchronize()
        for name, begin, end in self._spans:
            total[name] += begin.elapsed_time(end) / 1e3 if self._on_cuda else end - begin
        return total

    def _now(self) -> Any:
        if not self._on_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def run_layer(
    layer: CsaLayer,
    way: Way,
    out: Tensor,
    *,
    clock: StageClock | None = None,
    seen: Callable[[int, Tensor], None] | None = None,
) -> None:
    """The whole layer into `out` [tokens, heads, value_dim] bf16, and its caches.

    clock: of a run on one stream. seen: called with each chunk's first token and what the search found for it
    [chunk, top_k], which the chunk after may overwrite.
    """
    stage: Callable[[str], AbstractContextManager[None]] = clock.stage if clock else lambda name: nullcontext()
    side = side_stream() if way.overlapped and layer.device != "cpu" else None
    with stage("compressor"):
        layer.compress(way.compressor)
        keys = layer.paged_keys()
    lanes = 1 if side is None else 2
    found = torch.empty((lanes, way.chunk, layer.index.top_k), dtype=torch.int32, device=layer.device)
    indices = torch.empty((lanes, way.chunk, layer.attention.width), dtype=torch.int32, device=layer.device)
    attended: list[torch.cuda.Event] = []
    for number, start in enumerate(range(0, layer.tokens, way.chunk)):
        rows = slice(start, min(start + way.chunk, layer.tokens))
        count, lane = rows.stop - start, number % lanes
        if side is not None and number >= lanes:  # the chunk that used these buffers has been attended
            torch.cuda.current_stream().wait_event(attended[number - lanes])
        with stage("topk"):
            way.search(layer.searched(keys, rows), found[lane, :count])
        if seen is not None:
            seen(start, found[lane, :count])
        with stage("index rows"):
            assemble_index_rows(
                found[lane, :count], start, window=layer.attention.window, compressed_row=layer.tokens,
                implementation=way.assembly, out=indices[lane, :count],
            )  # fmt: skip
        attention = layer.attended(indices[lane, :count], rows)
        if side is None:
            with stage("attention"):
                way.attend(attention, out[rows])
        else:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                way.attend(attention, out[rows])
                attended.append(side.record_event())
    if side is not None:
        torch.cuda.current_stream().wait_stream(side)


@cache
def side_stream() -> torch.cuda.Stream:
    """The stream beside the current one; always the same, for memory that is freed on it is kept for it."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
