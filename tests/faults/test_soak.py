"""Caches come and go, and nothing of them stays: the short form of `python -m tests.faults.soak`.

So few caches say nothing of 16 bytes each by what a process holds of the system: what is counted must be the same to
the last one, resident memory may move by the allocator's own steps. So the objects of a server in this process are
counted too, where one that stays for every cache is seen after a few dozen.
"""

from __future__ import annotations

import gc
from collections import Counter

from streamindex_service.testing.service import RunningService
from tests.faults.soak import SETTINGS, Caller, Soak, Variant
from tests.support.calls import Calls
from tests.support.services import MIB, is_idle, wait_for

CACHES = 120
ROUNDS = 60  # of a clean and an aborted cache each
FEW = ROUNDS // 8  # objects of a type; a quarter of the aborted caches is left in each way
STEPS_BYTES = 4 * MIB  # of the allocator; a page or a message kept for each cache is more


def test_everything_comes_back():
    with RunningService(SETTINGS) as service:
        soak = Soak(service, callers=4)
        try:
            outcome = soak.run(CACHES, warm_up=40, rounds=1, allowance_bytes=STEPS_BYTES)
        finally:
            soak.close()
    assert outcome.faults() == []
    assert (outcome.clean.caches, outcome.aborted.caches) == (CACHES // 2, CACHES // 2)
    assert set(outcome.aborts) == {f"{what} {how}" for what in ("upload", "search") for how in ("cancelled", "dropped")}


def objects() -> Counter[str]:
    """Objects of the service, of its calls and of their tasks, by type."""
    gc.collect()
    kinds = (type(each) for each in gc.get_objects())
    named = Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    ours = ("streamindex_service.", "streamindex.", "_asyncio.", "asyncio.", "grpc._cython")
    return Counter({name: count for name, count in named.items() if name.startswith(ours)})


def test_no_object_stays(inside):
    variants = [Variant(0)]
    with Calls(inside.target) as calls:
        caller = Caller(inside.target, 0, variants)

        def work(rounds: int) -> Counter[str]:
            for _ in range(rounds):
                caller.clean()
                caller.aborted()

            def at_rest() -> bool:
                load = calls.load()
                return is_idle(load) and load.key_caches == 0 and not calls.ledger("host").reserved_bytes

            wait_for(at_rest)
            caller.connect()
            return objects()

        before = work(10)
        work(ROUNDS)
        # What a call leaves behind goes with its last callback, and a few objects come and go all the time.
        wait_for(lambda: not [name for name, more in (work(0) - before).items() if more >= FEW])
        caller.close()
