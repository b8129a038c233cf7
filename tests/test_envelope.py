"""Classes of piecewise-affine logits against dense evaluation."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from hullgeo.envelope import margins, read_classes


def random_rows(seed, rows, classes):
    rng = np.random.default_rng(seed)
    position = np.sort(np.concatenate([[0, 1], rng.uniform(size=rows - 2)]))
    return position, rng.normal(size=(rows, classes))


def at(position, value, where):
    return np.stack([np.interp(where, position, column) for column in value.T], axis=1)


@hypothesis.given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 6))
def test_classes_are_those_of_a_dense_evaluation(seed, rows, classes):
    position, value = random_rows(seed, rows, classes)
    slack = 1e-9
    found = read_classes(position, value, np.full(rows - 1, slack))
    assert found.proved
    assert len(found.classes) == len(found.lower) + 1 == len(found.margin)
    where = np.linspace(0, 1, 4001)
    dense = at(position, value, where)
    piece = np.searchsorted(found.upper, where)
    clear = np.searchsorted(found.lower, where) == piece
    np.testing.assert_array_equal(dense.argmax(axis=1)[clear], found.classes[piece[clear]])
    # The margin exceeds the slack up to the ends of a bracket, and is the slack there, but for the
    # rounding of positions.
    edges = np.concatenate([found.lower, found.upper])
    steepest = np.abs(np.diff(value, axis=0) / np.diff(position)[:, None]).max()
    np.testing.assert_allclose(
        margins(at(position, value, edges)), slack, rtol=1e-4, atol=1e-14 * (10 + steepest)
    )
    for lower, upper, slope, *pair in zip(
        found.lower, found.upper, found.slope, found.classes, found.classes[1:], strict=False
    ):
        before, after = pair
        step = 1e-9
        ends = at(position, value, np.asarray([lower - step, upper + step]))
        rise = (ends[1, after] - ends[1, before]) - (ends[0, after] - ends[0, before])
        assert slope > 0
        np.testing.assert_allclose(slope, rise / (upper - lower + 2 * step), rtol=1e-2)


@hypothesis.given(st.integers(0, 10_000), st.integers(2, 12))
def test_margin_is_the_smallest_dip_inside_a_class(seed, rows):
    position, value = random_rows(seed, rows, 3)
    found = read_classes(position, value, np.full(rows - 1, 1e-12))
    for number in range(len(found.classes)):
        begin = found.upper[number - 1] if number else 0.0
        end = found.lower[number] if number < len(found.lower) else 1.0
        inside = position[(position >= begin) & (position <= end)]
        where = np.union1d(inside, np.linspace(begin, end, 2001))
        margin = margins(at(position, value, where))
        around = np.concatenate([[np.inf], margin, [np.inf]])
        if number:
            around[0] = -np.inf  # a crossing is no dip
        if number < len(found.lower):
            around[-1] = -np.inf
        dips = margin[(margin <= around[:-2]) & (margin <= around[2:])]
        expected = dips.min(initial=np.inf)
        np.testing.assert_allclose(found.margin[number], expected, rtol=1e-9, atol=1e-9)


def test_a_class_between_two_rows_is_found():
    position = np.asarray([0.0, 1.0])
    value = np.asarray([[1.0, 0.9, 0.0], [0.0, 0.9, 1.0]])
    found = read_classes(position, value, np.asarray([1e-6]))
    np.testing.assert_array_equal(found.classes, [0, 1, 2])
    np.testing.assert_allclose(found.lower, [0.1, 0.9], atol=2e-6)
    assert found.proved


@pytest.mark.parametrize(
    ("value", "classes"),
    [
        ([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], [0]),  # touches a tie and turns back
        ([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], [0, 1]),  # crosses at a row
        ([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [0]),  # starts at a tie
        ([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], [0]),  # a tie throughout
        ([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [0]),  # ends in a tie
    ],
)
def test_ties_are_never_proved(value, classes):
    position = np.asarray([0.0, 0.5, 1.0])
    found = read_classes(position, np.asarray(value), np.full(2, 1e-6))
    np.testing.assert_array_equal(found.classes, classes)
    assert found.proved == (classes == [0, 1])


def test_three_classes_within_the_slack_are_one_change_that_is_not_proved():
    position = np.asarray([0.0, 1.0])
    value = np.asarray([[1.0, 0.5 + 1e-8, 0.0], [0.0, 0.5 + 1e-8, 1.0]])
    found = read_classes(position, value, np.asarray([1e-6]))
    np.testing.assert_array_equal(found.classes, [0, 2])
    assert not found.proved


def test_parts_that_disagree_where_they_meet_are_not_proved():
    position = np.asarray([0.0, 0.5, 0.5, 1.0])
    value = np.asarray([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert not read_classes(position, value, np.full(3, 1e-6)).proved
    value = np.asarray([[1.0, 0.0], [1.0, 0.0], [1.0, 1e-9], [1.0, 0.0]])
    assert read_classes(position, value, np.full(3, 1e-6)).proved


def test_a_single_class_needs_no_proof():
    found = read_classes(np.asarray([0.0, 1.0]), np.ones((2, 1)), np.asarray([1e-6]))
    assert found.proved
    assert found.classes == [0]
