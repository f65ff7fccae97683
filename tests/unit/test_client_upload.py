"""The upload state machine, without a network."""

from __future__ import annotations

import numpy as np
import pytest
from streamindex import checksum, framing
from streamindex.v1 import key_cache_pb2, types_pb2
from streamindex_client.effects import Pause
from streamindex_client.errors import InputError, OffsetGapError, ProtocolError
from streamindex_client.tensors import float_rows
from streamindex_client.upload import KeyRows, UploadSession

ROWS, DIM = 100, 16
KEYS = np.random.default_rng(0).integers(0, 60000, (ROWS, DIM), np.uint16)
SCALES = np.linspace(1, 2, ROWS, dtype=np.float32)


def session(chunk_bytes: int = 320, scales: bool = False, upload_id: str = "") -> UploadSession:
    keys = float_rows("keys", KEYS, (None, DIM), ("uint16",))
    rows = KeyRows(keys, float_rows("scales", SCALES, (ROWS,), ("float32",)) if scales else None)
    start = key_cache_pb2.AppendKeysHeader.Start(key_cache_id="c", layer=1, first_row=7, row_count=ROWS)
    return UploadSession(start, rows, chunk_bytes, upload_id)


def accepted(row: int = 0, window: int = 1 << 20, chunk: int = 0) -> bytes:
    message = key_cache_pb2.UploadAccepted(upload_id="u", row_offset=row, window_bytes=window, max_chunk_bytes=chunk)
    return key_cache_pb2.AppendKeysResponse(accepted=message).SerializeToString()


def acknowledged(row: int) -> bytes:
    message = key_cache_pb2.UploadAcknowledged(row_offset=row)
    return key_cache_pb2.AppendKeysResponse(acknowledged=message).SerializeToString()


def committed(keys: int = 107) -> bytes:
    message = key_cache_pb2.UploadCommitted(layer_keys=keys)
    return key_cache_pb2.AppendKeysResponse(committed=message).SerializeToString()


def send(machine: UploadSession):
    step = machine.next_step()
    return step if isinstance(step, Pause) else framing.parse_append_keys_request(step())


def send_all(machine: UploadSession) -> list:
    sent = []
    while not isinstance(message := send(machine), Pause):
        sent.append(message)
    return [*sent, message]


@pytest.mark.parametrize("scales", [False, True])
def test_a_whole_upload(scales):
    machine = session(scales=scales)
    machine.begin()
    header, wait = send_all(machine)
    assert (header.header.start.first_row, wait) == (7, Pause.WAIT)
    machine.receive(accepted())
    *chunks, finish, end = send_all(machine)
    assert end is Pause.HALF_CLOSE
    assert [chunk.row_offset for chunk in chunks] == list(range(0, ROWS, 8 if scales else 10))
    assert b"".join(bytes(chunk.parts[0]) for chunk in chunks) == KEYS.tobytes()
    assert b"".join(bytes(chunk.parts[1]) for chunk in chunks) == (SCALES.tobytes() if scales else b"")
    for chunk in chunks:
        assert chunk.crc32c == checksum.crc32c(bytes(chunk.parts[0]) + bytes(chunk.parts[1]))
    assert finish.finish.row_count == ROWS
    assert finish.finish.keys_crc32c == checksum.crc32c(KEYS)
    assert finish.finish.HasField("scales_crc32c") == scales
    assert not scales or finish.finish.scales_crc32c == checksum.crc32c(SCALES)
    machine.receive(acknowledged(ROWS))
    machine.receive(committed())
    assert (machine.layer_keys, machine.acknowledged) == (107, ROWS)


def test_the_window_bounds_what_is_not_acknowledged():
    machine = session()
    machine.begin()
    send_all(machine)
    machine.receive(accepted(window=1000))
    assert len(send_all(machine)) == 3 + 1  # 3 chunks of 320 bytes
    machine.receive(acknowledged(10))
    assert len(send_all(machine)) == 1 + 1
    machine.receive(acknowledged(10))  # said twice
    assert send_all(machine) == [Pause.WAIT]


def test_one_chunk_travels_in_the_smallest_window():
    machine = session()
    machine.begin()
    send_all(machine)
    machine.receive(accepted(window=1))
    assert len(send_all(machine)) == 1 + 1


@pytest.mark.parametrize("row", [0, 10, 37, 100])
@pytest.mark.parametrize("scales", [False, True])
def test_resume_where_the_server_says(row, scales):
    machine = session(scales=scales)
    machine.begin()
    send(machine)
    machine.receive(accepted(window=1600))
    send_all(machine)
    machine.begin()
    header = send(machine)
    assert header.header.resume_upload_id == "u"
    machine.receive(accepted(row))
    *chunks, finish, end = send_all(machine)
    assert end is Pause.HALF_CLOSE
    assert b"".join(bytes(chunk.parts[0]) for chunk in chunks) == KEYS[row:].tobytes()
    assert finish.finish.keys_crc32c == checksum.crc32c(KEYS)
    assert not scales or finish.finish.scales_crc32c == checksum.crc32c(SCALES)


def test_resume_of_an_upload_that_another_process_began():
    machine = session(upload_id="u")
    machine.begin()
    assert send(machine).header.resume_upload_id == "u"
    machine.receive(accepted(55))
    *chunks, finish, _ = send_all(machine)
    assert chunks[0].row_offset == 55
    assert finish.finish.keys_crc32c == checksum.crc32c(KEYS)


def test_a_stale_sender_does_not_disturb_the_next_attempt():
    machine = session()
    machine.begin()
    send(machine)
    machine.receive(accepted())
    stale = machine.next_step()
    machine.begin()
    send(machine)
    machine.receive(accepted())
    fresh = machine.next_step()
    assert not isinstance(stale, Pause)
    assert not isinstance(fresh, Pause)
    assert stale() == fresh()
    *_, finish, _ = send_all(machine)
    assert finish.finish.keys_crc32c == checksum.crc32c(KEYS)


def test_the_servers_chunk_limit_holds():
    machine = session()
    machine.begin()
    send(machine)
    machine.receive(accepted(chunk=70))
    assert send(machine).row_count == 2
    machine.begin()
    send(machine)
    with pytest.raises(InputError, match="a row has 32 bytes"):
        machine.receive(accepted(chunk=31))


def test_a_row_longer_than_the_chosen_chunk_travels_alone():
    machine = session(chunk_bytes=1)
    machine.begin()
    send(machine)
    machine.receive(accepted(chunk=4096))
    assert send(machine).row_count == 1


def test_refusals_are_typed():
    machine = session()
    machine.begin()
    refused = types_pb2.Error(code=11, reason="OFFSET_GAP", metadata={"expected_row_offset": "40"})
    with pytest.raises(OffsetGapError) as caught:
        machine.receive(key_cache_pb2.AppendKeysResponse(refused=refused).SerializeToString())
    assert caught.value.expected_row_offset == 40
    assert not caught.value.retriable


@pytest.mark.parametrize(
    "messages",
    [
        [None],
        [b""],
        [b"\xff"],
        [acknowledged(1)],
        [committed()],
        [accepted(101)],
        [accepted(), accepted()],
        [accepted(), acknowledged(50)],
        [accepted(), committed()],
    ],
)
def test_what_the_contract_does_not_allow(messages):
    machine = session()
    machine.begin()
    send(machine)
    for message in messages[:-1]:
        machine.receive(message)
    with pytest.raises(ProtocolError):
        machine.receive(messages[-1])
