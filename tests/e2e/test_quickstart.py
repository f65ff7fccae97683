"""docs/quickstart.md: its client runs as it is written, prints what is written, and its commands exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from typer.main import get_command

from streamindex_service.cli import app

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "quickstart.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    return [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]


def test_the_client_prints_what_the_guide_says(roomy_service, tmp_path):
    (program,), (output,) = blocks("python"), blocks("text")
    name = next(command[1] for command in commands() if command[0] == ".venv/bin/python")
    assert f"`{name}`" in TEXT
    (tmp_path / name).write_text(program)
    done = subprocess.run(
        [sys.executable, str(tmp_path / name), roomy_service.address], capture_output=True, text=True, timeout=90,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == output
    assert "wrong rows: 0\n" in done.stdout
    assert "decoded rightly: True best key: 1024\n" in done.stdout


def test_its_commands_exist():
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = set()
    for program, *arguments in commands():
        if program == "make":
            assert set(arguments) <= verbs
        elif program == ".venv/bin/streamindex":
            command = get_command(app).commands[arguments[0]]
            command.make_context(arguments[0], arguments[1:])  # raises for an option that it does not have
        else:
            assert program in ("git", "cd", ".venv/bin/python"), program
        seen.add(program)
    assert {"make", ".venv/bin/streamindex", ".venv/bin/python"} <= seen


def test_the_client_and_the_service_mean_the_same_socket():
    (serve,) = [arguments for program, *arguments in commands() if arguments[:1] == ["serve"]]
    (target,) = [arguments[-1] for program, *arguments in commands() if program == ".venv/bin/python"]
    assert target == f"unix://{serve[serve.index('--unix') + 1]}"
