"""The status page: one file without anything from elsewhere, and the figures of calls that it shows."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from typing import Any

from streamindex_service import __version__
from streamindex_service.frontend.service import Service

_SHARES = {"p50_s": 0.5, "p99_s": 0.99}


def _source(tag: str, text: str) -> str:
    """The policy's word for the one inline element with this tag: its hash, so that no other is ever run."""
    (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"


_TEXT = (importlib.resources.files("streamindex_service") / "data" / "status_page.html").read_text("utf-8")
HTML = _TEXT.encode()
CSP = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_source('script', _TEXT)}",
        f"style-src {_source('style', _TEXT)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


def about(device: str, implementation: str) -> dict[str, str]:
    """What the server is."""
    return {"version": __version__, "device": device, "implementation": implementation}


def calls(service: Service) -> list[dict[str, Any]]:
    """Calls by method since the start; quantiles are upper bounds, None beyond the largest."""
    found = []
    for method, counted in sorted(service.counters.methods.items()):
        ended, done = counted.codes.total(), counted.codes["OK"]
        if not ended and not counted.running:
            continue
        figures: dict[str, Any] = {"method": method, "running": counted.running, "ended": ended, "failed": ended - done}
        for name, share in _SHARES.items():
            seconds = counted.duration.quantile(share)
            figures[name] = seconds if seconds < float("inf") else None
        found.append(figures)
    return found
