"""The guided fuzzer's short form, and that it finds what the parsers must not do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="the extra `fuzz`")

ROOT = Path(__file__).parents[2]
# Nothing that the seeds have is read otherwise.
CARELESS = """
import sys
from tests.security import guided
from streamindex import framing

def careless(data):
    found = framing.parse_search_request(data)
    if isinstance(found, framing.Chunk) and found.row_count > 8:
        return framing.Chunk(found.row_offset, found.row_count FAULT, found.parts, found.crc32c)
    return found

guided.fuzz.PARSERS = ((careless, guided.fuzz.PARSERS[1][1]),)
sys.exit(guided.main())
"""


def fuzzed(directory, program, *arguments):
    """The fuzzer ends its process by itself."""
    paths = [str(ROOT), str(ROOT / "client"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *program, "--seed", "7", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_parsers(tmp_path):
    ended = fuzzed(tmp_path, ["-m", "tests.security.guided"], "--count", "30000")
    assert ended.returncode == 0, ended.stderr
    assert "stat::number_of_executed_units: 30000" in ended.stderr


@pytest.mark.parametrize(
    ("fault", "told"),
    [("- 1", "a chunk read otherwise than by protobuf"), ("// 0", "ZeroDivisionError")],
    ids=["another-value", "an-exception"],
)
def test_a_parser_that_fails_is_found(tmp_path, fault, told):
    ended = fuzzed(tmp_path, ["-c", CARELESS.replace("FAULT", fault)], "--count", "1000000")
    assert ended.returncode != 0
    assert told in ended.stdout + ended.stderr
