"""Copies of pages beside tiles on a CUDA device: which tiles wait for them, shown by a copy that is held up."""

from __future__ import annotations

import ctypes
import itertools
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from streamindex_service.ipc.segments import Segment
from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.worker.device import probe
from streamindex_service.worker.executor import Executor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda:0"
MIB = 1 << 20
LAYER_BYTES = 32 * MIB  # an allocation of its own
ROWS, HEADS, TOP_K, TILES = 64, 64, 512, 16
HELD_S, ANSWERED_S, NOTHING_S = 60, 30, 1


class Held:
    """A stream that goes no further before it is let go; a minute at most, and then `timed_out` is true."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.timed_out = False
        self._stream = stream
        self._go = threading.Event()

        def wait(_: int | None) -> None:
            self.timed_out = not self._go.wait(HELD_S)

        self._wait = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(wait)  # alive for as long as this is

    def __enter__(self) -> Held:
        launch = ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc
        assert launch(ctypes.c_void_p(self._stream.cuda_stream), self._wait, None) == 0
        return self

    def release(self) -> None:
        self._go.set()

    def __exit__(self, *_: object) -> None:
        self.release()
        self._stream.synchronize()
        assert not self.timed_out, "the device waited for what was held"


@dataclass(frozen=True)
class Layer:
    """A view of all pages of an extent."""

    view_id: int
    extent_id: int


class Rig:
    """An executor as the worker has it, and what a frontend would tell it. `content`: what pages hold, by its seed."""

    page_bytes = 0
    answer_bytes = 0

    def __init__(self) -> None:
        self.sent: queue.Queue[pb.FromWorker] = queue.Queue()
        self.executor = Executor(probe(DEVICE), "triton", "triton", self.sent.put)
        self.pages = LAYER_BYTES // self.page_bytes
        self._numbers = itertools.count(1)
        self._segments: dict[int, Segment] = {}
        self._contents: dict[int, int] = {}  # seed -> segment
        generator = torch.Generator().manual_seed(0)
        self.asked = [tensor.contiguous() for tensor in self.drawn(generator)]
        sizes = [-(-tensor.numel() * tensor.element_size() // 256) * 256 for tensor in self.asked]
        self._at = [sum(sizes[:number]) for number in range(len(sizes))]
        self._answers_at = sum(sizes)
        self.block = self.segment(self._answers_at + TILES * self.answer_bytes)
        for tensor, at in zip(self.asked, self._at, strict=True):
            self.bytes_of(self.block)[at : at + tensor.numel() * tensor.element_size()] = tensor.view(-1).view(
                torch.uint8
            )
        self._tiles: dict[int, int] = {}  # number -> where its answer is

    def drawn(self, generator: torch.Generator) -> list[torch.Tensor]:
        """What all tiles ask."""
        raise NotImplementedError

    def kind(self) -> dict[str, int]:
        """Of the views."""
        raise NotImplementedError

    def issue(self, tile_id: int, view_id: int, spans: list[pb.Span], answer: pb.Span) -> None:
        """Give the executor a tile."""
        raise NotImplementedError

    def segment(self, size_bytes: int) -> int:
        number, segment = next(self._numbers), Segment.create(size_bytes)
        message = pb.MapSegment(segment_id=number, segment_bytes=size_bytes, writable=True)
        self.executor.segments.add(message, os.dup(segment.fd))
        self._segments[number] = segment
        return number

    def bytes_of(self, segment_id: int) -> torch.Tensor:
        return torch.frombuffer(self._segments[segment_id].map, dtype=torch.uint8)

    def content(self, seed: int) -> int:
        """A segment with rows of a layer."""
        if seed not in self._contents:
            rows = torch.randn(LAYER_BYTES // 2, generator=torch.Generator().manual_seed(seed)).bfloat16()
            self._contents[seed] = self.segment(LAYER_BYTES)
            self.bytes_of(self._contents[seed]).copy_(rows.view(torch.uint8))
        return self._contents[seed]

    def extent(self) -> int:
        number = next(self._numbers)
        self.executor.store.extents.allocate(number, LAYER_BYTES)
        return number

    def load(self, extent_id: int, seed: int) -> int:
        """Copy a content to an extent; the operation's number."""
        number, offsets = next(self._numbers), [self.page_bytes * page for page in range(self.pages)]
        self.executor.load_pages(
            pb.LoadPages(
                operation_id=number, page_bytes=self.page_bytes,
                segment_ids=[self.content(seed)] * self.pages, segment_offsets=offsets,
                extent_ids=[extent_id] * self.pages, extent_offsets=offsets,
            )
        )  # fmt: skip
        return number

    def view(self, extent_id: int) -> Layer:
        number = next(self._numbers)
        message = pb.DefineView(
            view_id=number, length_keys=256 * self.pages, complete=True, **self.kind(),
            extent_ids=[extent_id] * self.pages,
            extent_offsets=[self.page_bytes * page for page in range(self.pages)],
        )  # fmt: skip
        self.executor.store.define_views(pb.DefineViews(views=[message]))
        return Layer(number, extent_id)

    def layer(self, seed: int) -> Layer:
        """One whose pages are there."""
        extent_id = self.extent()
        self.done(self.load(extent_id, seed))
        return self.view(extent_id)

    def tile(self, layer: Layer) -> int:
        number, place = next(self._numbers), len(self._tiles)
        self._tiles[number] = self._answers_at + place * self.answer_bytes
        spans = [pb.Span(segment_id=self.block, offset_bytes=at) for at in self._at]
        self.issue(number, layer.view_id, spans, pb.Span(segment_id=self.block, offset_bytes=self._tiles[number]))
        return number

    def done(self, *wanted: int) -> None:
        """Wait until these, and nothing else, are done, in whatever order."""
        found = [self.told(self.sent.get(timeout=ANSWERED_S)) for _ in wanted]
        assert sorted(found) == sorted(wanted)

    @staticmethod
    def told(message: pb.FromWorker) -> int:
        kind = message.WhichOneof("message")
        assert kind in ("operation_done", "tile_done"), message
        return message.tile_done.tile_id if kind == "tile_done" else message.operation_done.operation_id

    def answer(self, tile_id: int) -> torch.Tensor:
        at = self._tiles[tile_id]
        return self.bytes_of(self.block)[at : at + self.answer_bytes].clone()

    def right(self, seed: int) -> torch.Tensor:
        """The answer of a layer with this content, copied and searched with nothing beside it."""
        tile = self.tile(self.layer(seed))
        self.done(tile)
        return self.answer(tile)

    def close(self) -> None:
        torch.cuda.synchronize(DEVICE)
        self.executor.finish()
        for number, segment in self._segments.items():
            self.executor.unmap_segment(number)
            segment.close()


class SearchRig(Rig):
    page_bytes = 256 * 128 * 2
    answer_bytes = ROWS * TOP_K * 8

    def drawn(self, generator: torch.Generator) -> list[torch.Tensor]:
        return [
            torch.randn((ROWS, HEADS, 128), generator=generator).bfloat16(),
            torch.randn((ROWS, HEADS), generator=generator),
            torch.full((ROWS,), LAYER_BYTES // 256 - 1),
        ]

    def kind(self) -> dict[str, int]:
        return {"key_format": 1, "head_dim": 128}

    def issue(self, tile_id: int, view_id: int, spans: list[pb.Span], answer: pb.Span) -> None:
        scores = pb.Span(segment_id=answer.segment_id, offset_bytes=answer.offset_bytes + ROWS * TOP_K * 4)
        self.executor.search_tile(
            pb.SearchTile(
                tile_id=tile_id, sequences=[pb.SearchSequence(view_id=view_id, rows=ROWS)],
                rows=ROWS, heads=HEADS, ratio=1, top_k=TOP_K, order=1, workspace_bytes=64 * MIB,
                q=spans[0], w=spans[1], positions=spans[2], indices=answer, scores=scores,
            )
        )  # fmt: skip


class AttendRig(Rig):
    """Rows are window rows and named by indices at once."""

    page_bytes = 256 * 512 * 2
    answer_bytes = ROWS * HEADS * 512 * 2
    width, window = 128, 64

    def drawn(self, generator: torch.Generator) -> list[torch.Tensor]:
        rows = LAYER_BYTES // 1024
        return [
            torch.randn((ROWS, HEADS, 512), generator=generator).bfloat16(),
            torch.arange(rows - ROWS, rows),
            torch.randint(0, rows, (ROWS, self.width), generator=generator, dtype=torch.int32),
        ]

    def kind(self) -> dict[str, int]:
        return {"kv_format": 1, "head_dim": 512}

    def issue(self, tile_id: int, view_id: int, spans: list[pb.Span], answer: pb.Span) -> None:
        sequence = pb.AttendSequence(view_id=view_id, window_view_id=view_id, first_window_row=0, rows=ROWS)
        self.executor.attend_tile(
            pb.AttendTile(
                tile_id=tile_id, sequences=[sequence], window=self.window, rows=ROWS, heads=HEADS, width=self.width,
                value_dim=512, scale=512**-0.5, parts=1, workspace_bytes=64 * MIB,
                q=spans[0], positions=spans[1], indices=spans[2], out=answer,
            )
        )  # fmt: skip


@pytest.fixture(params=[SearchRig, AttendRig], ids=["search", "attend"])
def rig(request) -> Iterator[Rig]:
    torch.cuda.set_device(DEVICE)
    made = request.param()
    yield made
    made.close()


def test_a_tile_waits_for_its_own_pages_and_for_no_others(rig):
    """It is answered while a copy of others' pages is held up; one that reads those pages has the new ones."""
    right = {seed: rig.right(seed) for seed in (1, 2, 3)}  # compiles, too
    resident, moving = rig.layer(1), rig.layer(2)
    rig.done(before := rig.tile(moving))  # its view is kept, as the frontend keeps it
    assert torch.equal(rig.answer(before), right[2])
    with Held(rig.executor._promote) as held:
        copy = rig.load(moving.extent_id, 3)
        beside = rig.tile(resident)
        rig.done(beside)  # and nothing else
        assert torch.equal(rig.answer(beside), right[1])
        assert len(rig.executor._promotions) == 1, "the copy was made, though it was held up"
        behind = rig.tile(moving)
        with pytest.raises(queue.Empty):
            rig.sent.get(timeout=NOTHING_S)
        held.release()
        rig.done(copy, behind)
    assert torch.equal(rig.answer(behind), right[3])
    assert not torch.equal(right[3], right[2])


def test_the_worker_knows_which_tiles_lack_pages(rig):
    """So that they wait where others can go before them: all tiles of a kind are in one stream."""
    resident, moving = rig.layer(1), rig.layer(2)
    rig.content(3)  # mapping a segment may wait for the device

    def tile_of(layer: Layer) -> pb.SearchTile:
        return pb.SearchTile(sequences=[pb.SearchSequence(view_id=layer.view_id)])

    with Held(rig.executor._promote) as held:
        copy = rig.load(moving.extent_id, 3)
        assert [rig.executor.lacks_pages(tile_of(layer)) for layer in (resident, moving)] == [False, True]
        held.release()
        rig.done(copy)
    assert not rig.executor.lacks_pages(tile_of(moving))


def test_of_two_copies_to_one_place_the_second_stays(rig):
    right = {seed: rig.right(seed) for seed in (2, 3)}
    moving = rig.layer(1)
    with Held(rig.executor._promote) as held:
        copies = [rig.load(moving.extent_id, seed) for seed in (3, 2)]
        tile = rig.tile(moving)
        held.release()
        rig.done(*copies, tile)
    assert torch.equal(rig.answer(tile), right[2])


def test_memory_that_is_given_back_during_a_copy_is_the_next_ones(rig):
    """A search was cancelled, its pages went, and with them their extent: the same memory is another's at once."""
    right = {seed: rig.right(seed) for seed in (2, 3)}
    gone = rig.layer(1)
    address = rig.executor.store.bytes_at(gone.extent_id, 0, 1).data_ptr()
    with Held(rig.executor._promote) as held:
        stale = rig.load(gone.extent_id, 3)
        rig.executor.store.drop_view(gone.view_id)
        rig.executor.store.extents.free(gone.extent_id)
        extent_id = rig.extent()
        assert rig.executor.store.bytes_at(extent_id, 0, 1).data_ptr() == address
        copy = rig.load(extent_id, 2)
        tile = rig.tile(rig.view(extent_id))
        held.release()
        rig.done(stale, copy, tile)
    assert torch.equal(rig.answer(tile), right[2])
    assert not torch.equal(right[2], right[3])


def test_a_segment_stays_until_it_was_copied(rig):
    right = rig.right(3)
    moving, segment_id = rig.layer(1), rig.content(3)
    unmapped = threading.Event()

    def unmap() -> None:
        rig.executor.unmap_segment(segment_id)
        unmapped.set()

    with Held(rig.executor._promote) as held:
        copy = rig.load(moving.extent_id, 3)
        thread = threading.Thread(target=unmap)
        thread.start()
        assert not unmapped.wait(NOTHING_S)
        held.release()
        assert unmapped.wait(ANSWERED_S)
        thread.join()
        rig.done(copy)
    rig._segments.pop(segment_id).close()
    tile = rig.tile(moving)
    rig.done(tile)
    assert torch.equal(rig.answer(tile), right)
