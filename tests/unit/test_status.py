from __future__ import annotations

import pytest
from google.protobuf import any_pb2
from hypothesis import given
from hypothesis import strategies as st
from streamindex import status
from streamindex.v1 import status_pb2, types_pb2

text = st.text(max_size=20)
errors = st.builds(
    types_pb2.Error,
    code=st.integers(1, 16),
    reason=st.text(min_size=1, max_size=20),
    message=text,
    field=text,
    metadata=st.dictionaries(text, text, max_size=3),
    retry_after_ms=st.none() | st.integers(0, 2**32 - 1),
)


@given(errors)
def test_round_trip(error):
    assert status.from_trailer(status.to_trailer(error)) == error


def test_details_are_those_of_googleapis():
    error = types_pb2.Error(code=8, reason="QUEUE_FULL", message="m", field="f", retry_after_ms=1500)
    rich = status_pb2.RichStatus.FromString(status.to_trailer(error))
    names = [detail.type_url for detail in rich.details]
    assert names == [f"type.googleapis.com/google.rpc.{name}" for name in ("ErrorInfo", "BadRequest", "RetryInfo")]
    delay = status_pb2.RetryInfo.FromString(rich.details[2].value).retry_delay
    assert (delay.seconds, delay.nanos) == (1, 500_000_000)


def test_no_retry_info_without_a_delay():
    rich = status_pb2.RichStatus.FromString(status.to_trailer(types_pb2.Error(code=5, reason="R")))
    assert [detail.type_url.rsplit(".", 1)[1] for detail in rich.details] == ["ErrorInfo"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"not a status",
        status_pb2.RichStatus(code=5, message="no details").SerializeToString(),
        status_pb2.RichStatus(
            code=5, details=[any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")]
        ).SerializeToString(),
    ],
)
def test_what_is_not_ours_is_none(data):
    assert status.from_trailer(data) is None


def test_another_domain_is_not_ours():
    info = status_pb2.ErrorInfo(reason="R", domain="elsewhere")
    detail = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=info.SerializeToString())
    assert status.from_trailer(status_pb2.RichStatus(code=5, details=[detail]).SerializeToString()) is None


@given(st.binary(max_size=200))
def test_random_bytes_never_raise(data):
    found = status.from_trailer(data)
    assert found is None or found.reason


@given(errors, st.integers(0, 500), st.integers(1, 255))
def test_damaged_trailers_never_raise(error, where, flip):
    data = bytearray(status.to_trailer(error))
    data[where % len(data)] ^= flip
    found = status.from_trailer(bytes(data))
    assert found is None or found.reason
