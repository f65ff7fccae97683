from __future__ import annotations

import grpc
import pytest
from streamindex import status
from streamindex.v1 import types_pb2
from streamindex_client import errors

CASES = [
    (grpc.StatusCode.INVALID_ARGUMENT, "SHAPE", errors.InvalidRequestError),
    (grpc.StatusCode.INVALID_ARGUMENT, "NON_FINITE", errors.NonFiniteError),
    (grpc.StatusCode.INVALID_ARGUMENT, "EXCEEDS_BUDGET", errors.ExceedsBudgetError),
    (grpc.StatusCode.NOT_FOUND, "CACHE_NOT_FOUND", errors.NotFoundError),
    (grpc.StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND", errors.NotFoundError),
    (grpc.StatusCode.FAILED_PRECONDITION, "OTHER", errors.FailedPreconditionError),
    (grpc.StatusCode.FAILED_PRECONDITION, "CONVENTION_MISMATCH", errors.ConventionMismatchError),
    (grpc.StatusCode.FAILED_PRECONDITION, "POISON", errors.PoisonError),
    (grpc.StatusCode.ABORTED, "UPLOAD_CONFLICT", errors.UploadConflictError),
    (grpc.StatusCode.OUT_OF_RANGE, "OFFSET_GAP", errors.OffsetGapError),
    (grpc.StatusCode.DATA_LOSS, "CHECKSUM", errors.DataLossError),
    (grpc.StatusCode.DATA_LOSS, "DIGEST", errors.DataLossError),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", errors.ResourceExhaustedError),
    (grpc.StatusCode.UNAVAILABLE, "DRAINING", errors.UnavailableError),
    (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST", errors.WorkerLostError),
    (grpc.StatusCode.DEADLINE_EXCEEDED, "SLOW_CONSUMER", errors.SlowConsumerError),
    (grpc.StatusCode.UNAUTHENTICATED, "NO_CREDENTIALS", errors.AuthenticationError),
    (grpc.StatusCode.PERMISSION_DENIED, "X", errors.PermissionDeniedError),
    (grpc.StatusCode.UNIMPLEMENTED, "X", errors.UnimplementedError),
    (grpc.StatusCode.INTERNAL, "X", errors.InternalError),
    (grpc.StatusCode.CANCELLED, "X", errors.CancelledCallError),
    (grpc.StatusCode.UNKNOWN, "X", errors.StreamIndexError),
]


@pytest.mark.parametrize(("code", "reason", "kind"), CASES, ids=[case[1] + "-" + case[0].name for case in CASES])
def test_in_band_and_trailer_give_the_same_error(code, reason, kind):
    message = types_pb2.Error(code=code.value[0], reason=reason, message="why", field="f", metadata={"n": "1"})
    in_band = errors.from_message(message)
    trailer = errors.from_status(code, "bare", [("other", "x"), (status.TRAILER, status.to_trailer(message))])
    for error in (in_band, trailer):
        assert type(error) is kind
        assert (error.code, error.reason, error.field) == (code, reason, "f")
        assert (error.metadata, error.retry_after_s) == ({"n": "1"}, None)
        assert str(error) == f"{code.name}/{reason}: why (n=1)"
    assert type(errors.from_status(code, "bare")).default_code is code


def test_retry_info():
    message = types_pb2.Error(code=8, reason="QUEUE_FULL", retry_after_ms=1500)
    error = errors.from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "", [(status.TRAILER, status.to_trailer(message))])
    assert error.retry_after_s == 1.5
    assert error.retriable
    message.code = grpc.StatusCode.NOT_FOUND.value[0]
    assert not errors.from_message(message).retriable


def test_a_code_of_the_future():
    assert errors.from_message(types_pb2.Error(code=99, reason="X")).code is grpc.StatusCode.UNKNOWN


def test_a_trailer_that_is_not_ours_falls_back_to_the_status():
    error = errors.from_status(
        grpc.StatusCode.UNAVAILABLE, "gone", [(status.TRAILER, b"\xff"), (status.TRAILER, "text")]
    )
    assert isinstance(error, errors.UnavailableError)
    assert (error.message, error.reason, error.retriable) == ("gone", "", True)


def test_rpc_errors_without_a_status():
    error = errors.from_rpc(grpc.RpcError(), "id")
    assert (error.code, error.request_id) == (grpc.StatusCode.UNKNOWN, "id")


@pytest.mark.parametrize(("text", "row"), [("12", 12), ("", None), ("x", None), ("-1", None), ("\u0663", None)])
def test_expected_row_offset(text, row):
    message = types_pb2.Error(code=11, reason="OFFSET_GAP", metadata={"expected_row_offset": text})
    error = errors.from_message(message)
    assert isinstance(error, errors.OffsetGapError)
    assert error.expected_row_offset == row


def test_the_tree_in_the_docstring_is_the_tree():
    assert errors.__doc__ is not None
    drawn = {line.split("─ ")[1].split()[0] for line in errors.__doc__.splitlines() if "─ " in line}
    real: set[str] = set()
    waiting = [errors.StreamIndexError]
    while waiting:
        kinds = waiting.pop().__subclasses__()
        real |= {kind.__name__ for kind in kinds}
        waiting += kinds
    assert drawn == real
