"""A program that ends in the middle of a search ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from streamindex_service.testing.service import RunningService
from tests.support.services import CPU

PATIENCE_S = 60  # of a program that takes seconds, so that one that hangs is told from one that is slow
BEGINNING = """
import sys, threading
import numpy as np
import streamindex_client

# so few rows ahead that the stream's threads wait for room when the program ends
options = streamindex_client.ClientOptions(search_window_rows=100)
client = streamindex_client.connect(sys.argv[1], options=options)
cache = client.create_key_cache(heads=2, head_dim=32, ratio=4, key_format="bf16", layers=1)
cache.append(layer=0, keys=np.zeros((100, 32), np.uint16), first_row=0)
chunk = np.zeros((2000, 2, 32), np.uint16), np.zeros((2000, 2), np.float32)
started = threading.Event()

def forever():
    while True:
        yield chunk

def stuck():
    yield chunk[0][:5], chunk[1][:5]
    started.set()
    threading.Event().wait()

def search(chunks):
    return cache.search(layer=0, q=chunks, top_k=4, start_position=0)
"""
LEFT_IN_A_GLOBAL = """
parts = search(forever())
first = next(parts)
"""
A_TENSOR = """
parts = cache.search(layer=0, q=chunk[0], w=chunk[1], top_k=4, start_position=0)
next(parts)
"""
NOT_EVEN_BEGUN = """
parts = search(forever())
"""
IN_A_CYCLE = """
parts = [search(forever())]
parts.append(parts)
next(parts[0])
"""
STUCK_IN_THE_ITERATOR = """
parts = search(stuck())
next(parts)
started.wait()
"""
ON_ANOTHER_THREAD = """
def work():
    for part in search(forever()):
        started.set()

threading.Thread(target=work, daemon=True).start()
started.wait()
"""
BY_EXIT = """
parts = search(forever())
next(parts)
sys.exit(0)
"""
ENDINGS = {
    "global": LEFT_IN_A_GLOBAL,
    "tensor": A_TENSOR,
    "not-begun": NOT_EVEN_BEGUN,
    "cycle": IN_A_CYCLE,
    "stuck": STUCK_IN_THE_ITERATOR,
    "thread": ON_ANOTHER_THREAD,
    "exit": BY_EXIT,
}


@pytest.fixture(scope="module")
def address():
    with RunningService({"worker": CPU}) as service:
        yield service.address


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_program_that_leaves_a_search_ends(address, ending):
    ended = subprocess.run(
        [sys.executable, "-c", BEGINNING + ending, address], timeout=PATIENCE_S, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (0, "")
    assert "Fatal" not in ended.stderr
