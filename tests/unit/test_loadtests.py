"""What load tests make of their calls: reference, verdict, knee, parameters, reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamindex_client.model import Ledger, Load

from loadtests import __main__ as command_line
from loadtests.parameters import Parameters
from loadtests.profiles import CPU, PROFILES, Profile
from loadtests.requests_file import Outcome, Request, RequestsFile, read_requests
from loadtests.summary import call_rows, complaints, summarise
from loadtests.sweep import knee, within
from loadtests.target import Target, share_of
from loadtests.tensors import KeyRun, Tensors, WrongAnswerError
from loadtests.watch import Sample, Watched, differences

DECODE = replace(CPU, parameters=Parameters(**{name: 0 for name in vars(Parameters()) if name.endswith("_users")}))
DECODE = replace(DECODE, parameters=replace(DECODE.parameters, decode_users=1))


def loaded(**changes: Any) -> Load:
    ledgers = {name: Ledger(100, 10, 20) for name in ("hbm", "host", "ingress")}
    return Load(True, ledgers, 0, 0, 3, 0, 0, 0, 0, 1000, **changes)


def request(latency_ms: float = 10.0, outcome: Outcome = Outcome.OK, end_s: float = 100.0, **changes: Any) -> Request:
    return replace(Request(end_s, "decode", "SearchBatch", latency_ms, 1000, outcome, compared=True), **changes)


class TestTensors:
    TENSORS = Tensors(heads=3, head_dim=8, key_format="fp32", seed=1)

    def test_the_reference_is_scoring_everything_and_sorting(self) -> None:
        run, ratio, query, position = KeyRun(65_500, 100), 2, 2_050, 150
        keys = np.asarray(self.TENSORS.key_rows(KeyRun(run.offset), 75), np.float64)  # (150 + 1) // 2 are visible
        q, w = self.TENSORS.query_rows(query, 1)
        scores = [sum(w[0, h] * max(0.0, float(q[0, h] @ key)) for h in range(3)) for key in keys]
        best = sorted(range(75), key=lambda index: (-scores[index], index))
        assert self.TENSORS.expected(run, ratio, query, position, 16).tolist() == best[:16]

    def test_few_visible_keys_are_padded(self) -> None:
        assert self.TENSORS.expected(KeyRun(0, 100), 4, 0, 11, 5).tolist()[3:] == [-1, -1]

    def test_one_wrong_index_is_found(self) -> None:
        run = KeyRun(7, 64)
        answer = np.stack([self.TENSORS.expected(run, 1, 5 + row, 60 + row, 8) for row in range(2)])
        for row in range(2):
            self.TENSORS.check(answer, run, 1, (5, 2), 60, row)
        answer[1, 3] ^= 1
        with pytest.raises(WrongAnswerError, match="1 of 8"):
            self.TENSORS.check(answer, run, 1, (5, 2), 60, 1)

    def test_a_missing_row_is_found(self) -> None:
        with pytest.raises(WrongAnswerError, match="2 rows"):
            self.TENSORS.check(np.zeros((1, 8), np.int32), KeyRun(0, 64), 1, (0, 2), 0, 0)

    @pytest.mark.parametrize("key_format", ["bf16", "fp16", "fp32"])
    def test_a_run_goes_on_where_it_ended(self, key_format: str) -> None:
        tensors = Tensors(2, 8, key_format, 0)
        whole = tensors.key_rows(KeyRun(65_530), 20)
        assert np.array_equal(tensors.key_rows(KeyRun(65_530, 12), 8), whole[12:])


class TestVerdict:
    def reasons(self, requests: list[Request], watch: Watched | None = None) -> list[str]:
        return complaints(DECODE, call_rows(requests, 10), watch or Watched([Sample(0.0, loaded())]))

    def test_answered_and_compared_is_passed(self) -> None:
        assert self.reasons([request()]) == []

    @pytest.mark.parametrize("outcome", [each for each in Outcome if each is not Outcome.OK])
    def test_whatever_is_not_answered_fails(self, outcome: Outcome) -> None:
        assert self.reasons([request(), request(outcome=outcome)]) == [f"1 calls {outcome}"]

    def test_nothing_at_all_fails(self) -> None:
        assert "no SearchBatch of decode was answered" in self.reasons([])

    def test_nothing_compared_fails(self) -> None:
        assert self.reasons([request(compared=False)]) == ["no answer was compared with the reference"]

    def test_what_is_left_behind_fails(self) -> None:
        before, after = loaded(), replace(loaded(), key_caches=5, worker_restarts=1)
        assert differences(before, after) == ["+2 key caches", "+1 worker restarts"]
        assert self.reasons([request()], Watched(left=["+2 key caches"])) == ["left behind: +2 key caches"]

    def test_a_ledger_beyond_its_limit_fails(self) -> None:
        load = loaded()
        load.ledgers["hbm"] = Ledger(100, 10, 101)
        assert self.reasons([request()], Watched([Sample(0.0, load)])) == ["ledger hbm passed its limit"]

    def test_a_watch_that_broke_off_fails(self) -> None:
        assert self.reasons([request()], Watched(error="gone")) == ["the load could not be watched: gone"]


def test_latencies_are_of_answered_calls() -> None:
    late = request(9000.0, Outcome.REFUSED, error="QUEUE_FULL")
    (row,) = call_rows([*(request(float(ms)) for ms in range(1, 101)), late], seconds=10)
    assert (row["count"], row["ok"], row["refused"], row["max_ms"]) == (101, 100, 1, 100.0)
    assert row["p50_ms"] == pytest.approx(50.5)
    assert row["errors"] == {"QUEUE_FULL": 1}


def test_requests_come_back_from_their_files(tmp_path: Path) -> None:
    written = [request(), request(outcome=Outcome.FAILED, compared=False, error='a "reason", and more')]
    for name, each in zip("ab", written, strict=True):
        file = RequestsFile(tmp_path, name)
        file.write(each)
        file.close()
    assert list(read_requests(tmp_path)) == written


class TestKnee:
    @staticmethod
    def step(offered: float, p99_ms: float | None, refused: float = 0.0, failed: float = 0.0) -> dict[str, Any]:
        return {"offered_per_s": offered, "p99_ms": p99_ms, "refused_share": refused, "failed_share": failed}

    def test_the_last_load_before_the_first_that_was_too_much(self) -> None:
        steps = [self.step(10, 5), self.step(20, 6), self.step(40, 60), self.step(80, 7)]
        assert knee(steps, 50) == 20

    def test_refusals_and_failures_count_together(self) -> None:
        assert within(self.step(1, 5, 0.005, 0.005), 50)
        assert not within(self.step(1, 5, 0.006, 0.005), 50)

    def test_nothing_answered_is_beyond(self) -> None:
        assert knee([self.step(10, None)], 50) is None


class TestParameters:
    def test_texts_take_the_type_of_the_parameter(self) -> None:
        changed = Parameters().with_texts({"decode_rate": "2.5", "heads": "16", "key_format": "fp16"})
        assert (changed.decode_rate, changed.heads, changed.key_format) == (2.5, 16, "fp16")

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match="decode_speed"):
            Parameters().with_texts({"decode_speed": "1"})

    def test_every_profile_reaches_locust_whole(self) -> None:
        for profile in PROFILES.values():
            given = dict(each.removeprefix("--").split("=", 1) for each in profile.parameters.arguments())
            texts = {name.replace("-", "_"): value for name, value in given.items()}
            assert Parameters().with_texts(texts) == profile.parameters

    @pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
    def test_quotas_bear_one_user_and_not_all(self, profile: Profile) -> None:
        parameters, quotas = profile.parameters, profile.parameters.quotas()
        assert quotas["max_caller_caches"] == parameters.decode_sequences
        assert parameters.decode_users > 1
        assert quotas["max_caller_host_bytes"] >= 2 * parameters.head_dim * parameters.upload_keys
        assert quotas["max_caller_host_bytes"] < profile.settings["memory"]["host_budget_bytes"] // 2

    def test_tokens_are_for_a_service_that_runs(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            command_line.main(["run", "--out", "x", "--set", "tokens_file=tokens"])
        assert ended.value.code == 2
        assert "--address" in capsys.readouterr().err

    def test_tokens_that_cannot_be_read_are_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        empty = tmp_path / "tokens"
        empty.write_text("\n")
        for file in (empty, tmp_path / "absent"):
            command = ["run", "--out", "x", "--address", "unix:///nowhere", "--set", f"tokens_file={file}"]
            assert command_line.main(command) == 1
            assert str(file) in capsys.readouterr().err

    def test_a_wrong_command_line_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            command_line.main(["run", "--out", "x", "--set", "nonsense=1"])
        assert ended.value.code == 2
        assert "nonsense" in capsys.readouterr().err


class TestTarget:
    def test_the_watch_has_a_token_of_its_own_where_there_are_two(self) -> None:
        assert Target("unix:///x", ("watch", "a", "b")).user_tokens == ("a", "b")
        assert Target("unix:///x", ("a",)).user_tokens == ("a",)

    def test_tokens_are_dealt_out_and_none_twice(self) -> None:
        assert [share_of("abcde", number, 2) for number in range(2)] == ["ace", "bd"]
        assert share_of("abc", 0, 1) == "abc"

    def test_too_few_are_shared(self) -> None:
        assert [share_of("a", number, 2) for number in range(2)] == ["a", "a"]

    def test_tokens_are_not_shown(self) -> None:
        assert "secret" not in repr(Target("unix:///x", ("secret",)))


class TestReports:
    def test_a_summary_does_not_tell_where_it_was_made(self) -> None:
        where = {"address": "unix:///where", "tokens_file": "/where/tokens", "requests_dir": "/where/else"}
        profile = replace(DECODE, parameters=replace(DECODE.parameters, **where))
        assert "where" not in json.dumps(summarise(profile, [request()], Watched(), {}))

    def test_a_run(self, tmp_path: Path) -> None:
        requests = [request(end_s=100.0 + number) for number in range(20)]
        requests.append(request(outcome=Outcome.FAILED, error="<b>&</b>"))
        watch = Watched([Sample(99.0 + number, loaded()) for number in range(20)])
        (tmp_path / "summary.json").write_text(json.dumps(summarise(DECODE, requests, watch, {"device": "cpu"})))
        assert command_line.main(["report", str(tmp_path)]) == 0
        page = (tmp_path / "summary.html").read_text()
        assert "failed: 1 calls failed" in page
        assert "&lt;b&gt;" in page
        assert "<b>&</b>" not in page
        assert 'src="data:image/png' in page
        assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")

    def test_a_sweep(self, tmp_path: Path) -> None:
        steps = [
            {**TestKnee.step(rate, rate), "arrived_per_s": rate, "answered_per_s": rate, "p50_ms": 1.0}
            for rate in (10.0, 20.0)
        ]
        result = {
            "profile": "cpu", "header": {"device": "cpu"}, "parameters": {"heads": 8}, "step_s": 5,
            "p99_limit_ms": 15.0, "knee_per_s": 10.0, "steps": steps,
        }  # fmt: skip
        (tmp_path / "sweep.json").write_text(json.dumps(result))
        assert command_line.main(["report", str(tmp_path)]) == 0
        assert "knee: 10 calls a second" in (tmp_path / "sweep.html").read_text()


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["report", str(tmp_path)])
