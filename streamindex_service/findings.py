"""What the doctor finds."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and for a warning or a failure what to do about it."""

    name: str
    level: Level
    text: str
    remedy: str = ""
