"""Bearer tokens: a file of names and salted hashes, read anew when it changes.

A token is `sidx_ID_SECRET`: ID finds its line, SECRET is 32 random bytes. Guessing 256 random bits is hopeless without
a slow hash, so one that costs a call two microseconds is right; the salt keeps two files from being compared. A line:

    NAME ID SALT HASH        # HASH is BLAKE2b of SECRET, keyed by SALT; both in hexadecimal

Several lines may have one name: that is how a token is replaced without a gap.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PREFIX = "sidx"
_TOKEN = re.compile(rf"{_PREFIX}_([0-9a-f]{{12}})_([A-Za-z0-9_-]{{43}})")
_LINE = re.compile(r"([A-Za-z0-9._@-]{1,64})\s+([0-9a-f]{12})\s+([0-9a-f]{32})\s+([0-9a-f]{64})")
_LOOK_S = 1.0  # between two looks at the file
_MAX_FILE_BYTES = 16 << 20


class TokenFileError(Exception):
    """The file is not one of tokens. The message names the line, never what is in it."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    salt: bytes
    digest: bytes


_NOBODY = _Entry("", bytes(16), bytes(32))  # for an ID that is not there, so that it takes as long as one that is


def new_token(name: str) -> tuple[str, str]:
    """A new token, and the line for the file. Raises ValueError for a name that cannot be one."""
    key_id, secret, salt = secrets.token_hex(6), secrets.token_urlsafe(32), secrets.token_bytes(16)
    line = f"{name} {key_id} {salt.hex()} {_digest(secret, salt).hex()}"
    if not _LINE.fullmatch(line):
        raise ValueError("a name has 1 to 64 letters, digits, or any of . _ @ -")
    return f"{_PREFIX}_{key_id}_{secret}", line


class TokenFile:
    """Raises OSError and TokenFileError when it is made; later, a file that is not good leaves the last good one in
    force, and says so in the log."""

    def __init__(self, path: Path, log: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = _version(path)
        self._entries = read(path)
        self._looked_at = clock()

    def name_of(self, token: str) -> str | None:
        """Whose token it is; None for one that nobody has."""
        self._look()
        match = _TOKEN.fullmatch(token)
        key_id, secret = match.groups() if match else ("", "")
        entry = self._entries.get(key_id, _NOBODY)
        is_right = hmac.compare_digest(_digest(secret, entry.salt), entry.digest)
        return entry.name if is_right and entry.name else None

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked_at < _LOOK_S:
            return
        with self._lock:
            self._looked_at = now
            try:
                version = _version(self._path)
                if version == self._seen:
                    return
                self._entries = read(self._path)
                self._seen = version
            except (OSError, TokenFileError) as error:
                self._log.error("token_file_not_read", detail=str(error))
            else:
                self._log.info("token_file_read", tokens=len(self._entries))


def read(path: Path) -> dict[str, _Entry]:
    """Entries by ID. Raises OSError, TokenFileError."""
    found: dict[str, _Entry] = {}
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise TokenFileError(f"{path} may be written by others; chmod go-w")
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise TokenFileError(f"{path} has more than {_MAX_FILE_BYTES} bytes")
    for number, text in enumerate(data.decode(errors="replace").splitlines(), 1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise TokenFileError(f"{path}, line {number}: expected NAME ID SALT HASH")
        name, key_id, salt, digest = match.groups()
        if key_id in found:
            raise TokenFileError(f"{path}, line {number}: this ID is there already")
        found[key_id] = _Entry(name, bytes.fromhex(salt), bytes.fromhex(digest))
    return found


def _digest(secret: str, salt: bytes) -> bytes:
    return hashlib.blake2b(secret.encode(), key=salt, digest_size=32, person=b"sidx-token").digest()


def _version(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
