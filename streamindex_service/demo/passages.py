"""From the keys that a query picked to passages of the text they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_BEST_KEYS = 128  # of an answer row, that passages are made of
_GAP_TOKENS = 16  # keys closer than this belong to one passage
_CONTEXT_CHARACTERS = 40
_MAX_CHARACTERS = 240


@dataclass(frozen=True)
class Passage:
    """A stretch of text, the tokens it covers, how many of the best keys lie in it, and the best one's rank."""

    text: str
    first_token: int
    last_token: int
    keys: int
    best_rank: int


def best_passages(indices: Sequence[int], text: str, spans: Sequence[tuple[int, int]], limit: int = 5) -> list[Passage]:
    """Passages of an answer row (best key first, -1 pads).

    A passage weighs what its keys weigh together, each the reciprocal of its rank; the heaviest comes first.
    """
    ranks = {token: rank for rank, token in enumerate(indices[:_BEST_KEYS]) if token >= 0}
    groups: list[list[int]] = []
    for token in sorted(ranks):
        if groups and token - groups[-1][-1] <= _GAP_TOKENS:
            groups[-1].append(token)
        else:
            groups.append([token])
    groups.sort(key=lambda tokens: -sum(1 / (1 + ranks[token]) for token in tokens))
    return [
        Passage(
            excerpt(text, spans[tokens[0]][0], spans[tokens[-1]][1]),
            tokens[0],
            tokens[-1],
            len(tokens),
            min(ranks[token] for token in tokens),
        )
        for tokens in groups[:limit]
    ]


def excerpt(
    text: str, start: int, stop: int, before: int = _CONTEXT_CHARACTERS, after: int = _CONTEXT_CHARACTERS
) -> str:
    """Characters start to stop with some context, whole words, on one line, no longer than a few lines."""
    left, right = max(0, start - before), min(len(text), stop + after)
    while 0 < left < start and not text[left - 1].isspace():
        left += 1
    while stop < right < len(text) and not text[right].isspace():
        right -= 1
    shown = " ".join(text[left:right].split())
    if len(shown) > _MAX_CHARACTERS:
        middle = _MAX_CHARACTERS // 2
        shown = f"{shown[:middle].rstrip()} … {shown[-middle:].lstrip()}"
    return ("… " if left else "") + shown + (" …" if right < len(text) else "")
