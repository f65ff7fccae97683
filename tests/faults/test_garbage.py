"""What a call leaves behind for the garbage collector: nothing of ours, however it ended.

A full collection looks at the pages of all caches, and nobody is answered meanwhile: 0.4 s for a million of them. What
waits for one holds its memory until then.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType

import pytest
import streamindex_client
import torch
from streamindex_client.errors import NonFiniteError

from streamindex_service.errors import ServiceError
from streamindex_service.frontend.collector import spare_what_stays
from tests.faults.test_connections import KEYS, KIND, WAYS, alive
from tests.support.attend_batch import ASKED, Sequence
from tests.support.attention import Shape
from tests.support.calls import Calls
from tests.support.inprocess import InProcessServer
from tests.support.services import ROOMY, wait_for
from tests.support.tensors import Draw

TIMES = 3
OURS = "streamindex_service"


@pytest.fixture(scope="module")
def server() -> Iterator[InProcessServer]:
    with InProcessServer({**ROOMY, "server": {"sweep_s": 3600}}) as running:
        yield running


@pytest.fixture
def garbage(server: InProcessServer) -> Iterator[Callable[[Callable[[], object]], Counter[str]]]:
    """(work) -> what the collector finds of ours after it, by kind."""

    def found_after(work: Callable[[], object]) -> Counter[str]:
        work()  # what is made once
        wait_for(lambda: not server.server._calls.running)
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        for _ in range(TIMES):
            work()
        wait_for(lambda: not server.server._calls.running)
        # their last callbacks run on the loop
        wait_for(lambda: alive("_ServicerContext") <= 1)
        gc.collect()
        return Counter(kind for each in gc.garbage if (kind := kind_of(each)))

    yield found_after
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


def kind_of(found: object) -> str:
    """A name for what is ours."""
    if isinstance(found, FrameType):
        code = found.f_code
        return f"frame of {code.co_name}" if OURS in code.co_filename else ""
    return type(found).__qualname__ if str(type(found).__module__).startswith(OURS) else ""


@pytest.mark.parametrize("way", WAYS)
def test_a_call_leaves_nothing(garbage, server, way):
    with Calls(server.target) as calls, calls.cache(KIND, Draw(1).keys(KIND, KEYS)) as cache:
        assert garbage(lambda: way(calls, cache.id)) == Counter()


def attend(sequence: Sequence, _: streamindex_client.Client) -> None:
    assert sequence.alone().out.isfinite().all()


def wrong_attend(sequence: Sequence, _: streamindex_client.Client) -> None:
    q = sequence.queries.q.clone()
    q[-1] = torch.nan
    with pytest.raises(NonFiniteError):
        sequence.alone(q=q)


def attend_batch(sequence: Sequence, client: streamindex_client.Client) -> None:
    (result,) = client.sparse_attend_batch([sequence.item()], **ASKED)
    assert result.error is None


@pytest.mark.parametrize("way", [attend, wrong_attend, attend_batch])
def test_a_call_of_attention_leaves_nothing(garbage, server, way):
    with streamindex_client.connect(server.target) as client:
        sequence = Sequence(client, Shape(), 600, 40, 1)
        assert garbage(lambda: way(sequence, client)) == Counter()
        sequence.cache.delete()


def test_full_collections_are_rare_and_spare_what_was_there():
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        spare_what_stays()
        assert gc.get_threshold() == (*before[:2], 10 * before[2])
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


def test_what_waits_for_the_collector_is_seen(garbage):
    def circle() -> None:
        error = ServiceError("refers to itself")
        error.metadata["error"] = error

    assert garbage(circle) == {"ServiceError": TIMES}
