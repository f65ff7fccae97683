"""A headless Chromium, spoken to in its DevTools protocol over a pair of pipes: no port, no driver, no library."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
WAIT_S = 60.0
# The browser reads commands from descriptor 3 and writes answers and events to 4, each message with a NUL behind it.
_START = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """The one that STREAMINDEX_BROWSER names, or Chromium by any of its names. The variable is no setting: it goes."""
    return os.environ.pop("STREAMINDEX_BROWSER", "") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser with one page.

    `requests` are the addresses that the page asked for, `problems` what it complained of: exceptions, errors and
    warnings on the console, and what the browser refused or could not load.
    """

    def __init__(self, executable: str, profile: Path) -> None:
        self._executable = shutil.which(executable) or executable
        self._profile = profile
        self._ids = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        self.requests: list[str] = []
        self.problems: list[str] = []

    def __enter__(self) -> Browser:
        theirs_in, self._commands = os.pipe()
        self._answers, theirs_out = os.pipe()
        arguments = [
            self._executable, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--no-first-run", "--remote-debugging-pipe",
            f"--user-data-dir={self._profile}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs_in), str(theirs_out), *arguments],
            pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._commands)  # it ends when nobody can command it any more
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)

    def open(self, url: str) -> None:
        """Go there."""
        answer = self.call("Page.navigate", url=url)
        assert not answer.get("errorText"), answer

    def evaluate(self, expression: str) -> Any:
        """What an expression of JavaScript is in the page, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, holds: Callable[[Any], bool]) -> Any:
        """Ask until it holds; the last value. What the page says by itself meanwhile is kept."""
        end = time.monotonic() + WAIT_S
        while not holds(value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression} stays {value}; {self.problems}"
            self._take(0.1)
        return value

    def screenshot(self) -> str:
        """The page as PNG, in base64."""
        data: str = self.call("Page.captureScreenshot")["data"]
        return data

    def call(self, method: str, **parameters: Any) -> Any:
        """A command's result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            answer = self._take(end - time.monotonic())
            if answer is not None and answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
        raise AssertionError(f"the browser did not answer {method}")

    def _take(self, wait_s: float) -> Any:
        """The next message; None when none comes in time. Events are noted."""
        while b"\0" not in self._buffer:
            readable, _, _ = select.select([self._answers], [], [], max(0.0, wait_s))
            if not readable:
                return None
            data = os.read(self._answers, 1 << 20)
            assert data, f"the browser ended with {self._process.wait()}"
            self._buffer += data
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(raw)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, event: Any) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(event["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(event["args"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.problems.append(json.dumps(event["entry"]))
