"""What a caller may tune, as frozen values checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamindex_client.errors import InputError

__all__ = ["ClientOptions", "RetryPolicy"]

MAX_MESSAGE_BYTES = 64 << 20
"""Longest gRPC message sent or taken; chunks are about 1 MiB, a SearchBatch is the long one."""

MESSAGES_AHEAD = 2
"""Messages of a stream that are built, or being built, before gRPC has taken the one before."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When an idempotent call is sent again.

    The n-th attempt waits `initial_s · multiplier^(n-1)`, at most `max_s`, shortened at random by up to `jitter` of
    itself, and never less than the server asked for. `max_attempts` and `max_total_s` bound the attempts in a row that
    brought no progress; rows acknowledged or answered start the count again.
    """

    max_attempts: int = 12
    initial_s: float = 0.1
    multiplier: float = 2.0
    max_s: float = 5.0
    jitter: float = 0.5
    max_total_s: float = 120.0

    def __post_init__(self) -> None:
        _require("max_attempts", self.max_attempts >= 1, "expected at least 1")
        _require("initial_s", self.initial_s >= 0, "expected at least 0")
        _require("multiplier", self.multiplier >= 1, "expected at least 1")
        _require("max_s", self.max_s >= self.initial_s, "expected at least initial_s")
        _require("jitter", 0 <= self.jitter <= 1, "expected a share from 0 to 1")
        _require("max_total_s", self.max_total_s >= 0, "expected at least 0")


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Sizes and times of a client.

    `chunk_bytes`: payload of one message, at least a row. `search_window_bytes`, `search_window_rows`: queries sent
    and not answered that a search may have; it is also what a search keeps of an iterator's chunks for a retry.
    `default_timeout_s` holds for calls that are given none. `reconnect_max_s`: longest pause between two attempts to
    connect. `keepalive_s`: pings on an idle connection, off when None (servers close connections that ping too often).
    """

    chunk_bytes: int = 1 << 20
    search_window_bytes: int = 64 << 20
    search_window_rows: int = 1 << 16
    default_timeout_s: float | None = None
    reconnect_max_s: float = 2.0
    keepalive_s: float | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def __post_init__(self) -> None:
        _require("chunk_bytes", 1 <= self.chunk_bytes <= MAX_MESSAGE_BYTES // 2, "expected 1 to 32 MiB")
        _require("search_window_bytes", self.search_window_bytes >= 1, "expected at least 1")
        _require("search_window_rows", self.search_window_rows >= 1, "expected at least 1")
        _require("default_timeout_s", self.default_timeout_s is None or self.default_timeout_s > 0, "expected above 0")
        _require("reconnect_max_s", self.reconnect_max_s > 0, "expected above 0")
        _require("keepalive_s", self.keepalive_s is None or self.keepalive_s > 0, "expected above 0")


def _require(name: str, holds: bool, expectation: str) -> None:
    if not holds:
        raise InputError(name, expectation)
