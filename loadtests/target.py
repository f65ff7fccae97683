"""The service under load, and who its callers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import streamindex_client
from streamindex_client import Client


@dataclass(frozen=True)
class Target:
    """`tokens`: the watch's, then the users'; a single one is everybody's. With none all are one caller."""

    address: str
    tokens: Sequence[str] = field(default=(), repr=False)

    def connect(self) -> Client:
        """A connection of the watch."""
        return streamindex_client.connect(self.address, token=self.tokens[0] if self.tokens else None)

    @property
    def user_tokens(self) -> Sequence[str]:
        """Those of the users."""
        return self.tokens[1:] or self.tokens


def share_of(tokens: Sequence[str], number: int, processes: int) -> Sequence[str]:
    """What a process has of tokens that are dealt out to several; one that would get none has all of them."""
    return tokens[number % processes :: processes] or tokens
