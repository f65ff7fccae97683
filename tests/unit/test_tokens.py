"""Bearer tokens: what is in the file, who is found, what is not a file of tokens."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from streamindex_service import cli
from streamindex_service.frontend.tokens import TokenFile, TokenFileError, new_token, read
from streamindex_service.testing.tokens import read_tokens, write_token_file, write_tokens


class Log:
    def __init__(self) -> None:
        self.events: list[str] = []

    def error(self, event: str, **_: Any) -> None:
        self.events.append(event)

    info = error


def tokens_in(path: Path, *lines: str, now: list[float] | None = None, log: Log | None = None) -> TokenFile:
    path.write_text("\n".join(lines))
    return TokenFile(path, log or Log(), (lambda: now[0]) if now else (lambda: 0.0))


def test_a_token_finds_its_name(tmp_path):
    (one, line), (other, other_line) = new_token("one"), new_token("o.t_h-e@r")
    found = tokens_in(tmp_path / "t", "# a comment", line, "", other_line + "  # and one more")
    assert found.name_of(one) == "one"
    assert found.name_of(other) == "o.t_h-e@r"


def test_the_file_holds_nothing_of_the_secret():
    token, line = new_token("x")
    secret = token.split("_", 2)[2]
    assert secret not in line
    assert len({new_token("x")[1] for _ in range(20)}) == 20


def test_the_same_secret_has_another_hash_under_another_salt(tmp_path):
    token, line = new_token("x")
    name, key_id, _, digest = line.split()
    found = tokens_in(tmp_path / "t", f"{name} {key_id} {'0' * 32} {digest}")
    assert found.name_of(token) is None


def test_what_is_no_token_finds_nobody(tmp_path):
    token, line = new_token("x")
    found = tokens_in(tmp_path / "t", line)
    for wrong in ("", "sidx_", token[:-1], token + "x", token.upper(), token + "\n", new_token("x")[0], "é" * 61):
        assert found.name_of(wrong) is None
    assert tokens_in(tmp_path / "empty").name_of(token) is None


def test_nobody_is_found_under_the_entry_that_stands_for_none(tmp_path):
    found = tokens_in(tmp_path / "t")
    assert found.name_of("sidx_000000000000_" + "A" * 43) is None


def test_a_token_is_replaced_without_a_gap(tmp_path):
    (old, old_line), (new, new_line) = new_token("x"), new_token("x")
    found = tokens_in(tmp_path / "t", old_line, new_line)
    assert found.name_of(old) == found.name_of(new) == "x"


def test_changes_are_seen_after_a_second(tmp_path):
    path, now, log = tmp_path / "t", [10.0], Log()
    (one, line), (other, other_line) = new_token("one"), new_token("other")
    found = tokens_in(path, line, now=now, log=log)
    path.write_text(other_line)
    assert found.name_of(one) == "one"
    now[0] += 1.1
    assert found.name_of(one) is None
    assert found.name_of(other) == "other"
    path.write_text("nonsense")
    now[0] += 1.1
    assert found.name_of(other) == "other"
    path.unlink()
    now[0] += 1.1
    assert found.name_of(other) == "other"
    assert log.events == ["token_file_read", "token_file_not_read", "token_file_not_read"]


@pytest.mark.parametrize(
    "text", ["x", "a b c d", "name 0123456789ab 00 11", "\xff", "{line} more", "{line}\n{line}", "bad/name {rest}"]
)
def test_what_is_no_file_of_tokens(tmp_path, text):
    line = new_token("x")[1]
    path = tmp_path / "t"
    path.write_text(text.format(line=line, rest=line.partition(" ")[2]))
    with pytest.raises(TokenFileError, match="line"):
        read(path)


def test_a_file_that_others_may_write_is_refused(tmp_path):
    path = tmp_path / "t"
    path.write_text(new_token("x")[1])
    os.chmod(path, 0o666)
    with pytest.raises(TokenFileError, match="chmod"):
        read(path)


@pytest.mark.parametrize("name", ["", " ", "a b", "x" * 65, "a/b", "#"])
def test_names_that_cannot_be(name):
    with pytest.raises(ValueError, match="letters"):
        new_token(name)


def test_the_command_prints_the_token_and_its_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["streamindex", "token", "new", "trainer"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    shown = capsys.readouterr()
    assert tokens_in(tmp_path / "t", shown.err).name_of(shown.out.strip()) == "trainer"
    monkeypatch.setattr(sys, "argv", ["streamindex", "token", "new", "trainer", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    fields = json.loads(capsys.readouterr().out)
    assert tokens_in(tmp_path / "u", fields["line"]).name_of(fields["token"]) == "trainer"


def test_a_name_that_cannot_be_is_a_matter_of_usage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["streamindex", "token", "new", "a b"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == cli.EXIT_USAGE


def test_callers_under_test_have_a_file_of_their_own(tmp_path):
    path = tmp_path / "tokens"
    tokens = write_token_file(path, ["one", "other"])
    assert path.stat().st_mode & 0o777 == 0o600
    found = TokenFile(path, Log())
    assert {name: found.name_of(token) for name, token in tokens.items()} == {"one": "one", "other": "other"}
    with pytest.raises(FileExistsError):
        write_token_file(path, ["one"])
    with pytest.raises(ValueError, match="a name"):
        write_token_file(tmp_path / "wrong", ["a name"])
    assert not (tmp_path / "wrong").exists()


def test_tokens_are_handed_on_in_a_file(tmp_path):
    path = tmp_path / "tokens"
    write_tokens(path, ["a", "b"])
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_tokens(path) == ["a", "b"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="no token"):
        read_tokens(path)
