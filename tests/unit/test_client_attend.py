"""The state machine of attention's client, without a network."""

from __future__ import annotations

import numpy as np
import pytest
from streamindex import checksum, framing
from streamindex.v1 import attention_pb2, types_pb2
from streamindex_client.attend_requests import attend_source
from streamindex_client.effects import Pause
from streamindex_client.errors import DataLossError, FailedPreconditionError, InputError, ProtocolError
from streamindex_client.formats import KeyFormat
from streamindex_client.model import KeyCacheInfo, KeyCacheSpec, KvSpec
from streamindex_client.options import ClientOptions
from streamindex_client.retry import Environment

HEADS, DIM, VALUE_DIM = 2, 32, 16
SPEC = KeyCacheSpec(3, 16, 4, KeyFormat.BF16, 1, "plain", kv=KvSpec("bf16", DIM, VALUE_DIM, HEADS))
INFO = KeyCacheInfo("cache", SPEC, (0,), 0, 0)
ROW_BYTES = HEADS * DIM * 2 + 5 * 4


def session(rows: int, **more):
    env = Environment(ClientOptions(chunk_bytes=10 * ROW_BYTES))
    q = np.arange(rows, dtype=np.uint16)[:, None, None] * np.ones((1, HEADS, DIM), np.uint16)
    arguments = {
        "layer": 0, "q": q, "index_q": None, "index_w": None, "top_k": None, "start_position": 50, "positions": None,
        "indices": np.arange(5 * rows).reshape(rows, 5), "window": 4, "scale": 0.1, "sink": np.array([1.0, -np.inf]),
        "want_lse": True, "priority": "batch", "convention": None,
    }  # fmt: skip
    return attend_source(env, INFO, **arguments | more).session


def accepted(version: int = 7) -> bytes:
    message = attention_pb2.SparseAttendAccepted(layer_keys=9, kv_rows=9, implementation="i", layer_version=version)
    return attention_pb2.SparseAttendResponse(accepted=message).SerializeToString()


def answer(row: int, rows: int, crc: int | None = None) -> bytes:
    out = np.full((rows, HEADS, VALUE_DIM), row, "<u2").tobytes()
    lse = np.full((rows, HEADS), row, "<f4").tobytes()
    found = checksum.crc32c(lse, checksum.crc32c(out)) if crc is None else crc
    return framing.encode_output_chunk(row, rows, out, lse, found)


def send_all(made) -> list:
    sent = []
    while not isinstance(step := made.next_step(), Pause):
        sent.append(framing.parse_attend_request(step()))
    return [*sent, step]


def test_a_call_from_header_to_done():
    made = session(25)
    made.begin()
    header, pause = send_all(made)
    assert pause is Pause.WAIT
    sent = header.header
    assert (sent.given_indices, sent.window, sent.row_count, sent.start_position) == (5, 4, 25, 50)
    assert (sent.scale, list(sent.sink), sent.priority) == (0.1, [1.0, -np.inf], types_pb2.PRIORITY_BATCH)
    assert made.receive(accepted()) is None
    *chunks, pause = send_all(made)
    assert pause is Pause.HALF_CLOSE
    assert [chunk.row_count for chunk in chunks] == [10, 10, 5]
    q, index_q, index_w, indices, positions = chunks[1].parts
    assert np.array_equal(np.frombuffer(q, "<u2").reshape(10, HEADS, DIM)[:, 0, 0], np.arange(10, 20))
    assert np.array_equal(np.frombuffer(indices, "<i4"), np.arange(50, 100))
    assert not index_q.nbytes + index_w.nbytes + positions.nbytes
    part = made.receive(answer(0, 10))
    assert (part.row_offset, part.out.shape, part.out.dtype, part.lse.shape) == (0, (10, 2, 16), np.uint16, (10, 2))
    assert made.receive(answer(10, 15)).rows == 15
    done = attention_pb2.SparseAttendDone(row_count=25, device_us=4)
    made.receive(attention_pb2.SparseAttendResponse(done=done).SerializeToString())
    assert made.done
    assert (made.summary.rows, made.summary.kv_rows, made.summary.attempts, made.summary.device_us) == (25, 9, 1, 4)


@pytest.mark.parametrize("positions", [False, True], ids=["from a start", "with positions"])
def test_all_visible_rows_take_queries_alone(positions):
    where = {"start_position": None, "positions": np.arange(25)} if positions else {}
    made = session(25, indices=None, all_visible=True, **where)
    made.begin()
    header, _ = send_all(made)
    assert (header.header.WhichOneof("selection"), header.header.all_visible) == ("all_visible", True)
    made.receive(accepted())
    *chunks, _ = send_all(made)
    assert sum(chunk.row_count for chunk in chunks) == 25
    assert [[part.nbytes for part in chunk.parts[1:4]] for chunk in chunks] == [[0, 0, 0]] * len(chunks)
    assert sum(chunk.parts[4].nbytes for chunk in chunks) == 200 * positions


@pytest.mark.parametrize(
    "asked",
    [{"all_visible": True}, {"indices": None}, {"all_visible": True, "indices": None, "top_k": 3}, {"top_k": 3}],
)
def test_there_is_one_selection(asked):
    with pytest.raises(InputError, match="give top_k, indices or all_visible"):
        session(3, **asked)


def test_all_visible_rows_take_no_index_queries():
    with pytest.raises(InputError, match="index_q"):
        session(3, indices=None, all_visible=True, index_q=np.ones((3, 3, 16), np.uint16))


def test_a_retry_begins_at_the_first_unanswered_row_of_the_same_layer():
    made = session(25)
    made.begin()
    send_all(made)
    made.receive(accepted())
    send_all(made)
    made.receive(answer(0, 12))
    made.begin()
    header = send_all(made)[0].header
    assert (header.start_position, header.row_count, header.expected_layer_version) == (62, 13, 7)
    made.receive(accepted())
    chunks = send_all(made)[:-1]
    assert [(chunk.row_offset, chunk.row_count) for chunk in chunks] == [(0, 8), (8, 5)]
    assert made.receive(answer(0, 13)).row_offset == 12
    assert made.answered_rows == 25


@pytest.mark.parametrize(("message", "error"), [
    (answer(1, 2), ProtocolError),
    (answer(0, 99), ProtocolError),
    (answer(0, 2, crc=1), DataLossError),
    (framing.encode_output_chunk(0, 2, b"short", b"", None), ProtocolError),
    (b"\xff", ProtocolError),
    (None, ProtocolError),
    (attention_pb2.SparseAttendResponse(refused=types_pb2.Error(code=9, reason="NO_KV_ROWS")).SerializeToString(),
     FailedPreconditionError),
])  # fmt: skip
def test_what_the_contract_does_not_allow(message, error):
    made = session(25)
    made.begin()
    send_all(made)
    made.receive(accepted())
    send_all(made)
    with pytest.raises(error):
        made.receive(message)
