"""Rounds of callers at work while something is killed or stopped at a hand-over, for as long as one likes.

    python -m tests.faults.kill_loop --rounds 100 --seed 4711        # or: make kill-loop COUNT=100 SEED=4711

The first rounds go through all points with each action; from then on points and what happens there are drawn. A fault
ends the loop with its round; the same seed draws the same rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from streamindex_service.testing.failpoints import Action, Point
from tests.support.faulty_service import FaultyService
from tests.support.kill_rounds import KillRounds, settings
from tests.support.run_header import run_header

POINTS_A_ROUND = 5
SHARES = {Action.KILL_WORKER: 0.7, Action.STOP_WORKER: 0.2, Action.KILL_FRONTEND: 0.1}


def drawn_rounds(seed: int) -> Iterator[tuple[Action, list[Point]]]:
    """What happens in each round, without an end."""
    random = np.random.default_rng(seed)
    for action in SHARES:
        points = [Point(str(point)) for point in random.permutation(list(Point))]
        size = 1 if action is Action.KILL_FRONTEND else POINTS_A_ROUND
        for first in range(0, len(points), size):
            yield action, points[first : first + size]
    while True:
        action = Action(str(random.choice(list(SHARES), p=list(SHARES.values()))))
        count = 1 if action is Action.KILL_FRONTEND else POINTS_A_ROUND
        yield action, [Point(str(point)) for point in random.choice(list(Point), count)]


def main(arguments: list[str]) -> int:
    """Play, telling every round."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kill_loop", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the rounds go, as JSON, when all were played")
    options = parser.parse_args(arguments)
    head, played = run_header("tests.faults.kill_loop", arguments), []
    with tempfile.TemporaryDirectory(prefix="spill-") as folder, FaultyService(settings(Path(folder))) as service:
        rounds = KillRounds(service, Path(folder))
        for number, (action, points) in zip(range(options.rounds), drawn_rounds(options.seed), strict=False):
            began = time.monotonic()
            print(f"{number}: {action} at {', '.join(points)}", end="", flush=True)
            try:
                if action is Action.KILL_FRONTEND:
                    rounds.play_frontend(points[0])
                else:
                    rounds.play(points, action)
            except BaseException:
                print(f"\nfailed; the end of the log:\n{service.log_tail()}", flush=True)
                raise
            seconds = round(time.monotonic() - began, 1)
            played.append({"action": action, "points": points, "seconds": seconds})
            print(f": {seconds} s", flush=True)
        if options.out is not None:
            result = {"header": head, "told_without_retries": dict(rounds.told), "rounds": played}
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{options.rounds} rounds; callers without retries were told: {dict(rounds.told)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
