"""The search state machine, without a network."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamindex import checksum, framing
from streamindex.v1 import search_pb2
from streamindex_client.effects import Pause
from streamindex_client.errors import DataLossError, InputError, ProtocolError
from streamindex_client.formats import KeyFormat
from streamindex_client.model import KeyCacheInfo, KeyCacheSpec
from streamindex_client.options import ClientOptions
from streamindex_client.requests import search_source
from streamindex_client.retry import Environment

HEADS, DIM = 2, 16
SPEC = KeyCacheSpec(HEADS, DIM, 4, KeyFormat.BF16, 3, "plain")
INFO = KeyCacheInfo("cache", SPEC, (0, 0, 0), 0, 0)
ROW_BYTES = HEADS * DIM * 2 + HEADS * 4


def tensors(rows: int, start: int = 0):
    q = np.arange(start, start + rows, dtype=np.uint16)[:, None, None] * np.ones((1, HEADS, DIM), np.uint16)
    return q, np.full((rows, HEADS), 0.5, np.float32)


def source(q, w=None, *, options=None, start_position: int | None = 50, **more):
    env = Environment(options or ClientOptions(chunk_bytes=10 * ROW_BYTES))
    arguments = {"layer": 1, "top_k": 2, "positions": None, "order": "score", "mode": "exact"}
    arguments |= {"want_scores": False, "priority": None, "convention": None}
    return search_source(env, INFO, q=q, w=w, start_position=start_position, **arguments | more)


def accepted(chunk: int = 0) -> bytes:
    message = search_pb2.SearchAccepted(layer_keys=9, implementation="i", max_chunk_bytes=chunk)
    return search_pb2.SearchResponse(accepted=message).SerializeToString()


def done(rows: int) -> bytes:
    return search_pb2.SearchResponse(done=search_pb2.SearchDone(row_count=rows, device_us=4)).SerializeToString()


def answer(row: int, rows: int, top_k: int = 2, value: int = 0, crc: int | None = None) -> bytes:
    indices = np.full((rows, top_k), value, np.int32).tobytes()
    return framing.encode_index_chunk(row, rows, indices, b"", checksum.crc32c(indices) if crc is None else crc)


def send_all(session) -> list:
    sent = []
    while not isinstance(step := session.next_step(), Pause):
        sent.append(framing.parse_search_request(step()))
    return [*sent, step]


def opened(session):
    session.begin()
    header, wait = send_all(session)
    assert wait is Pause.WAIT
    session.receive(accepted())
    return header.header


def test_tensors_travel_in_chunks():
    q, w = tensors(25)
    session = source(q, w).session
    header = opened(session)
    assert (header.layer, header.top_k, header.start_position, header.row_count) == (1, 2, 50, 25)
    assert (header.convention, header.query_format) == ("plain", 1)
    *chunks, end = send_all(session)
    assert end is Pause.HALF_CLOSE
    assert [(chunk.row_offset, chunk.row_count) for chunk in chunks] == [(0, 10), (10, 10), (20, 5)]
    assert b"".join(bytes(chunk.parts[0]) for chunk in chunks) == q.tobytes()
    assert b"".join(bytes(chunk.parts[1]) for chunk in chunks) == w.tobytes()
    for chunk in chunks:
        assert chunk.crc32c == checksum.crc32c(b"".join(map(bytes, chunk.parts)))
    part = session.receive(answer(0, 25, value=3))
    assert part is not None
    assert part.indices.shape == (25, 2)
    assert part.indices.dtype == np.int32
    session.receive(done(25))
    assert session.done
    assert session.summary.rows == 25
    assert session.kept_rows == 0


def test_a_retry_begins_at_the_first_unanswered_row():
    q, w = tensors(25)
    session = source(q, w).session
    first = opened(session)
    send_all(session)
    session.receive(answer(0, 13))
    header = opened(session)
    assert (header.start_position, header.row_count) == (63, 12)
    assert header.request_key == first.request_key != ""
    *chunks, _ = send_all(session)
    assert [(chunk.row_offset, chunk.row_count) for chunk in chunks] == [(0, 7), (7, 5)]
    assert b"".join(bytes(chunk.parts[0]) for chunk in chunks) == q[13:].tobytes()
    part = session.receive(answer(0, 12))
    assert part is not None
    assert part.row_offset == 13
    session.receive(done(12))
    assert session.summary.attempts == 2


def test_explicit_positions_are_sliced():
    q, w = tensors(25)
    positions = np.arange(25)[::-1].astype(np.int32) * 3
    session = source(q, w, start_position=None, positions=positions).session
    assert opened(session).explicit_positions
    send_all(session)
    session.receive(answer(0, 4))
    opened(session)
    *chunks, _ = send_all(session)
    sent = b"".join(bytes(chunk.parts[2]) for chunk in chunks)
    assert np.frombuffer(sent, "<i8").tolist() == positions[4:].tolist()


def test_the_window_in_rows_and_in_bytes():
    for options in (
        ClientOptions(chunk_bytes=10 * ROW_BYTES, search_window_rows=30),
        ClientOptions(chunk_bytes=10 * ROW_BYTES, search_window_bytes=30 * ROW_BYTES),
    ):
        session = source(*tensors(100), options=options).session
        opened(session)
        assert [type(each) for each in send_all(session)] == [framing.Chunk] * 3 + [Pause]
        session.receive(answer(0, 9))
        assert send_all(session) == [Pause.WAIT]
        session.receive(answer(9, 1))
        assert len(send_all(session)) == 1 + 1


def test_input_is_asked_for_only_when_the_window_has_room():
    options = ClientOptions(chunk_bytes=10 * ROW_BYTES, search_window_rows=20)
    session = source(iter(()), options=options).session
    opened(session)
    for start in (0, 10):
        assert session.next_step() is Pause.NEED_INPUT
        session.feed(tensors(10, start))
        assert not session.wants_input
        assert not isinstance(session.next_step(), Pause)
    assert session.next_step() is Pause.WAIT
    session.receive(answer(0, 5))
    assert session.next_step() is Pause.NEED_INPUT
    session.feed(tensors(0))  # an empty block is passed over
    assert session.next_step() is Pause.NEED_INPUT
    session.end_input()
    assert session.next_step() is Pause.HALF_CLOSE
    assert session.kept_rows == 15


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 60), st.integers(1, 15), st.integers(0, 2**32))
def test_any_history_answers_every_row_once_and_keeps_no_more_than_the_window(blocks, window, chunk_rows, seed):
    chance = random.Random(seed)
    options = ClientOptions(chunk_bytes=chunk_rows * ROW_BYTES, search_window_rows=window)
    session = source(iter(()), options=options).session
    feeds, fed, answered, server = list(blocks), 0, 0, 0
    base = 0
    opened(session)
    while True:
        step = session.next_step()
        if step is Pause.NEED_INPUT:
            if feeds:
                session.feed(tensors(feeds[0], fed))
                fed += feeds.pop(0)
            else:
                session.end_input()
            continue
        if not isinstance(step, Pause):
            chunk = framing.parse_search_request(step())
            words = np.frombuffer(chunk.parts[0], "<u2").reshape(chunk.row_count, -1)[:, 0]
            assert words.tolist() == list(range(base + server, base + server + chunk.row_count))
            server += chunk.row_count
            assert base + server - answered <= window or server == chunk.row_count
        waiting = base + server - answered
        if waiting and chance.random() < 0.5:
            rows = chance.randint(1, waiting)
            part = session.receive(answer(answered - base, rows))
            assert part is not None
            assert part.row_offset == answered
            answered += rows
        elif step is Pause.HALF_CLOSE and not waiting:
            break
        if chance.random() < 0.1:
            base, server = answered, 0
            assert opened(session).start_position == 50 + base
    session.receive(done(server))
    assert answered == fed == sum(blocks)
    assert session.complete


def test_a_damaged_answer_is_retriable_and_answers_nothing():
    session = source(*tensors(5)).session
    opened(session)
    send_all(session)
    with pytest.raises(DataLossError) as caught:
        session.receive(answer(0, 5, crc=1))
    assert caught.value.retriable
    assert session.kept_rows == 5


@pytest.mark.parametrize(
    "message",
    [
        None,
        b"\xff",
        b"",
        accepted(),
        done(5),
        answer(1, 1),
        answer(0, 6),
        answer(0, 0),
        answer(0, 1, top_k=3),
    ],
)
def test_what_the_contract_does_not_allow(message):
    session = source(*tensors(5)).session
    opened(session)
    send_all(session)
    with pytest.raises(ProtocolError):
        session.receive(message)


def test_answers_before_acceptance():
    session = source(*tensors(5)).session
    session.begin()
    with pytest.raises(ProtocolError):
        session.receive(answer(0, 1))
    with pytest.raises(ProtocolError):
        session.receive(done(0))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"layer": 3}, "layer"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"order": "random"}, "order"),
        ({"mode": "fast"}, "mode"),
        ({"priority": "urgent"}, "priority"),
        ({"start_position": -1}, "start_position"),
        ({"start_position": None}, "start_position"),
        ({"positions": [1, 2, 3]}, "positions"),
        ({"start_position": None, "positions": [1, 2]}, "positions"),
        ({"start_position": None, "positions": [1, 2, -3]}, "positions"),
        ({"start_position": None, "positions": [1.0, 2.0, 3.0]}, "positions"),
        ({"q": 5, "w": None}, "q"),
        ({"q": [], "w": 3}, "w"),
        ({"q": np.zeros((3, HEADS, DIM + 1), np.uint16)}, "q"),
        ({"q": np.zeros((3, HEADS, DIM), np.float32)}, "q"),
        ({"w": np.zeros((2, HEADS), np.float32)}, "w"),
        ({"w": np.zeros((3, HEADS), np.float64)}, "w"),
        ({"w": None}, "w"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(change, field):
    q, w = tensors(3)
    with pytest.raises(InputError) as caught:
        source(**{"q": q, "w": w} | change)
    assert caught.value.field == field
    assert isinstance(caught.value, ValueError)
    assert field in str(caught.value)


@pytest.mark.parametrize("chunk", [5, (1,), tensors(1)[0], (*tensors(1), [0])])
def test_chunks_of_the_wrong_form(chunk):
    session = source(iter(())).session
    with pytest.raises(InputError, match=r"\(q, w\)"):
        session.feed(chunk)


def test_chunks_with_positions():
    session = source(iter(()), start_position=None).session
    assert opened(session).explicit_positions
    session.feed((*tensors(2), [5, 3]))
    chunk, _ = send_all(session)
    assert np.frombuffer(chunk.parts[2], "<i8").tolist() == [5, 3]
    with pytest.raises(InputError):
        session.feed(tensors(2))
