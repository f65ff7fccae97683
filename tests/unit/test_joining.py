"""Joining without the interpreter lock is joining."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
from streamindex import joining

OCTETS = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8)
READ_ONLY = OCTETS.copy()
READ_ONLY.setflags(write=False)


@pytest.fixture(params=["cpython", "any"])
def _either_way(request, monkeypatch):
    if request.param == "any":
        monkeypatch.setattr(joining, "_new_bytes", None)


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b""],
        [b"a", b"", memoryview(b"bc")],
        [b"head", OCTETS.data, b"tail"],
        [OCTETS[:70_000].data, bytearray(OCTETS[70_000:]), memoryview(b"")],
        [OCTETS.reshape(300, -1).view(np.float32).data, READ_ONLY.data],
        [OCTETS[1:].data],  # at an odd address
    ],
    ids=["none", "empty", "small", "framed", "kinds", "shapes", "odd"],
)
def test_it_is_what_join_gives(pieces):
    joined = joining.join(pieces)
    assert type(joined) is bytes
    assert joined == b"".join(bytes(piece) for piece in pieces)
    assert hash(joined) == hash(bytes(memoryview(joined)))


def test_many_threads_at_once():
    pieces = [b"head", OCTETS.data, b"tail"]
    expected, wrong = b"".join(pieces), []

    def work() -> None:
        wrong.extend(1 for _ in range(200) if joining.join(pieces) != expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_piece_is_freed_while_any_is_copied(monkeypatch):
    data, refused = bytearray(OCTETS), []
    move = ctypes.memmove

    def clear_meanwhile(*arguments: Any) -> None:
        try:
            data.clear()
        except BufferError:
            refused.append(True)
        else:
            raise AssertionError("the piece was freed before it was copied")
        move(*arguments)

    monkeypatch.setattr(joining.ctypes, "memmove", clear_meanwhile)
    assert joining.join([b"head", data, b"tail"]) == b"head" + OCTETS.tobytes() + b"tail"
    assert len(refused) == 3
    data.clear()  # now it may
