"""Statuses carry their sentence, results are pytrees, and failures are named on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hullgeo
from hullgeo import BoundaryDistance, Crossing, Membership, Status, failed, raise_if_failed


def distances(status) -> BoundaryDistance:
    status = jnp.asarray(status, jnp.int32)
    zeros = jnp.zeros(status.shape, jnp.int32)
    return BoundaryDistance(jnp.ones(status.shape), zeros, zeros, status)


@pytest.mark.parametrize("codes", [Status, Membership])
def test_every_member_carries_its_sentence(codes):
    assert len({code.message for code in codes}) == len(codes)
    for code in codes:
        assert code.message[0].isupper()
        assert code.message.endswith(".")
        assert codes(int(code)) is code


def test_statuses_are_stable_integers():
    assert Status.CONVERGED == 0
    assert [Membership.OUTSIDE, Membership.UNDECIDED, Membership.INSIDE] == [-1, 0, 1]
    assert [int(code) for code in Status] == list(range(len(Status)))


def test_statuses_work_as_numbers_in_traced_code():
    code = jax.jit(lambda bad: jnp.where(bad, jnp.int32(Status.NONFINITE), Status.CONVERGED))
    answer = code(jnp.array([True, False]))
    assert answer.dtype == jnp.int32
    assert [Status(value) for value in answer.tolist()] == [Status.NONFINITE, Status.CONVERGED]


def test_success_returns_the_result_itself():
    result = distances([0, 0])
    assert raise_if_failed(result) is result
    scalar = distances(0)
    assert raise_if_failed(scalar) is scalar
    empty = distances([])
    assert raise_if_failed(empty) is empty


def test_failure_names_result_rows_counts_and_sentences():
    with pytest.raises(RuntimeError) as caught:
        raise_if_failed(distances([0, 4, 0, 1, 4, 1, 1, 1, 1, 1]))
    message = str(caught.value)
    assert message.startswith("BoundaryDistance failed.")
    assert "STEP_LIMIT in 6 of 10 (rows 3, 5, 6, 7, 8, ...)" in message
    assert "NONFINITE in 2 of 10 (rows 1, 4)" in message
    assert Status.STEP_LIMIT.message in message
    assert Status.NONFINITE.message in message


def test_failure_of_one_answer_and_of_a_matrix_of_answers():
    with pytest.raises(RuntimeError, match=r"CAPACITY in 1 of 1: The support"):
        raise_if_failed(distances(2))
    with pytest.raises(RuntimeError, match=r"STALLED in 1 of 6 \(rows \(1, 2\)\)"):
        raise_if_failed(distances([[0, 0, 0], [0, 0, 7]]))


def test_an_unknown_status_is_reported_and_not_hidden():
    with pytest.raises(RuntimeError, match=r"status 99 in 1 of 2 \(rows 1\)"):
        raise_if_failed(distances([0, 99]))


def test_raise_if_failed_refuses_tracers():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda status: raise_if_failed(distances(status)).distance)(jnp.zeros(2, jnp.int32))


def test_raise_if_failed_names_what_has_no_status():
    with pytest.raises(TypeError, match="tuple"):
        raise_if_failed((1, 2))


def test_failed_is_traceable_and_row_wise():
    np.testing.assert_array_equal(failed(distances([0, 3, 0])), [False, True, False])
    np.testing.assert_array_equal(jax.jit(failed)(distances([[5], [0]])), [[True], [False]])


def test_results_pass_through_transformations():
    result = distances([0, 1, 2])
    assert isinstance(jax.jit(lambda value: value)(result), BoundaryDistance)
    rows = jax.vmap(lambda row: row._replace(distance=2 * row.distance))(result)
    np.testing.assert_array_equal(rows.distance, [2, 2, 2])
    last, stacked = jax.lax.scan(lambda carry, row: (carry, row), 0, result)
    assert last == 0
    np.testing.assert_array_equal(stacked.status, result.status)


def test_every_result_with_a_status_says_so_last_or_before_its_query():
    for name in dir(hullgeo):
        kind = getattr(hullgeo, name)
        if isinstance(kind, type) and hasattr(kind, "_fields"):
            assert "status" in kind._fields or kind.__doc__, name
    assert Crossing._fields[-1] == "status"
