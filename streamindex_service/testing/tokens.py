"""Tokens for callers under test: the service's file with their hashes, and files that hand them on, one a line.

Tokens go to other processes in files: arguments are in the list of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from streamindex_service.frontend.tokens import new_token


def write_token_file(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Make a file for `auth.token_file`; each name's token. Raises FileExistsError, ValueError for a wrong name."""
    made = {name: new_token(name) for name in names}
    _write(path, (line for _, line in made.values()))
    return {name: token for name, (token, _) in made.items()}


def write_tokens(path: Path, tokens: Iterable[str]) -> None:
    """Make a file of the tokens themselves, for its owner alone. Raises FileExistsError."""
    _write(path, tokens)


def read_tokens(path: Path) -> list[str]:
    """The tokens of a file, one a line. Raises OSError, ValueError for a file without any."""
    tokens = path.read_text(encoding="utf-8").split()
    if not tokens:
        raise ValueError(f"there is no token in {path}")
    return tokens


def _write(path: Path, lines: Iterable[str]) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
