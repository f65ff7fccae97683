from __future__ import annotations

import pytest
from streamindex_client import ClientOptions, InputError, RetryPolicy
from streamindex_client.errors import (
    DeadlineError,
    InternalError,
    NotFoundError,
    PoisonError,
    ResourceExhaustedError,
    UnavailableError,
)
from streamindex_client.retry import Environment


class World:
    """A clock that only sleeping moves."""

    def __init__(self, *, chance: float = 0.0, timeout: float | None = None, **policy: float) -> None:
        self.now = 1000.0
        options = ClientOptions(retry=RetryPolicy(**policy))  # type: ignore[arg-type]
        env = Environment(options, lambda: self.now, lambda: chance, lambda: "key")
        self.retrier = env.retrier(env.deadline(timeout))

    def fail(self, error, **more) -> float:
        delay = self.retrier.delay_s(error, **more)
        self.now += delay
        return delay


def test_delays_double_up_to_their_bound():
    world = World(initial_s=1, max_s=5, max_attempts=6)
    error = UnavailableError("x")
    assert [world.fail(error) for _ in range(5)] == [1, 2, 4, 5, 5]
    with pytest.raises(UnavailableError) as caught:
        world.fail(error)
    assert caught.value is error


def test_jitter_shortens():
    assert World(chance=1.0, initial_s=1, jitter=0.5).fail(UnavailableError("x")) == 0.5


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_never_sooner_than_the_server_asks(chance):
    delay = World(chance=chance).fail(ResourceExhaustedError("x", retry_after_s=3.0))
    assert 3.0 <= delay <= 3.3


@pytest.mark.parametrize("kind", [NotFoundError, PoisonError, InputError])
def test_some_are_never_tried_again(kind):
    error = InputError("a", "b") if kind is InputError else kind("x", retry_after_s=0.1)
    with pytest.raises(kind):
        World().fail(error)


def test_others_only_when_offered():
    with pytest.raises(InternalError):
        World().fail(InternalError("x"))
    assert World().fail(InternalError("x", retry_after_s=0.5)) == 0.5
    with pytest.raises(UnavailableError):
        World().fail(UnavailableError("x"), idempotent=False)
    assert World().fail(UnavailableError("x", retry_after_s=0.5), idempotent=False) == 0.5


def test_progress_starts_the_count_again():
    world = World(max_attempts=3, initial_s=1, max_total_s=3.5)
    for _ in range(10):
        world.fail(UnavailableError("x"))
        world.fail(UnavailableError("x"))
        world.retrier.progress()
    assert world.retrier.failures == 0


def test_total_time_is_bounded():
    world = World(initial_s=1, max_s=1, max_attempts=1000, max_total_s=10)
    for _ in range(10):
        world.fail(UnavailableError("x"))
    with pytest.raises(UnavailableError):
        world.fail(UnavailableError("x"))


def test_no_attempt_starts_after_the_deadline():
    world = World(initial_s=1, max_s=1, timeout=2.5)
    world.fail(UnavailableError("x"))
    world.fail(UnavailableError("x"))
    with pytest.raises(DeadlineError) as caught:
        world.fail(UnavailableError("x"))
    assert isinstance(caught.value.__cause__, UnavailableError)
    world.now += 10
    with pytest.raises(DeadlineError):
        world.fail(UnavailableError("x"))


@pytest.mark.parametrize(
    "values",
    [
        {"max_attempts": 0},
        {"initial_s": -1},
        {"multiplier": 0.5},
        {"max_s": 0},
        {"jitter": 2},
        {"max_total_s": -1},
    ],
)
def test_policies_are_checked(values):
    with pytest.raises(InputError) as caught:
        RetryPolicy(**values)
    assert caught.value.field in values


@pytest.mark.parametrize(
    "values",
    [
        {"chunk_bytes": 0},
        {"chunk_bytes": 1 << 30},
        {"search_window_bytes": 0},
        {"search_window_rows": 0},
        {"default_timeout_s": 0},
        {"reconnect_max_s": 0},
        {"keepalive_s": 0},
    ],
)
def test_options_are_checked(values):
    with pytest.raises(InputError) as caught:
        ClientOptions(**values)
    assert caught.value.field in values
