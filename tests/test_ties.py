"""Ties of classes against DAQP and HiGHS, proofs of existence and of absence included."""

from itertools import combinations

import daqp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from hullgeo import Domain, LinearHead, Status, nearest_boundary_point, tie_map, tie_point
from hullgeo import ties as ties_module


def all_sets(num_classes, least=1):
    return np.array(
        [
            np.isin(np.arange(num_classes), chosen)
            for size in range(least, num_classes + 1)
            for chosen in combinations(range(num_classes), size)
        ]
    )


def random_head(seed, dim, num_classes):
    rng = np.random.default_rng(seed)
    return LinearHead(rng.normal(size=(dim, num_classes)), 0.5 * rng.normal(size=num_classes))


def conditions(head, chosen):
    """Rows of `A x + b`: zero for classes of the set, at most zero for the others."""
    reference = int(np.flatnonzero(chosen)[0])
    others = np.arange(len(chosen)) != reference
    normals = (head.kernel - head.kernel[:, [reference]]).T[others]
    offsets = (head.bias - head.bias[reference])[others]
    return normals, offsets, np.asarray(chosen)[others]


def daqp_distance(query, head, chosen, lower, upper):
    """Distance from DAQP, infinite where it finds no tie."""
    normals, offsets, equal = conditions(head, chosen)
    sense = np.concatenate([np.zeros(len(query)), np.where(equal, 5, 0)]).astype(np.int32)
    point, _, flag, _ = daqp.solve(
        np.eye(len(query)),
        -query,
        np.ascontiguousarray(normals),
        np.concatenate([np.full(len(query), upper), -offsets]),
        np.concatenate([np.full(len(query), lower), np.where(equal, -offsets, -1e30)]),
        sense,
        primal_tol=1e-11,
    )
    return np.linalg.norm(point - query) if flag > 0 else np.inf


@pytest.mark.parametrize(
    ("dim", "num_classes", "lower", "upper"),
    [(8, 5, 0.0, None), (3, 5, None, None), (3, 5, 0.0, None), (3, 5, -1.0, 1.0)],
)
def test_agrees_with_daqp(dim, num_classes, lower, upper):
    statuses = set()
    for seed in range(3):
        head = random_head(seed, dim, num_classes)
        sets = all_sets(num_classes)
        query = np.random.default_rng(seed).normal(size=dim)
        result = tie_point(query, head, sets, lower=lower, upper=upper)
        assert result.distance.shape == (len(sets),)
        statuses |= set(np.asarray(result.status).tolist())
        for row, chosen in enumerate(sets):
            distance = daqp_distance(
                query,
                head,
                chosen,
                -1e20 if lower is None else lower,
                1e20 if upper is None else upper,
            )
            slack = 1e-8 * (1 + distance)
            assert (int(result.status[row]) == Status.INFEASIBLE) == np.isinf(distance)
            if np.isfinite(distance):
                assert int(result.status[row]) == Status.CONVERGED
                assert result.distance_lower_bound[row] - slack <= distance
                assert distance <= result.distance[row] + slack
                check_point(result, row, query, head, chosen, lower, upper)
    assert Status.CONVERGED in statuses
    assert Status.INFEASIBLE in statuses


def check_point(result, row, query, head, chosen, lower, upper):
    """The point ties, and is the projection that its multipliers promise."""
    point = np.asarray(result.point[row])
    logits = point @ head.kernel + head.bias
    np.testing.assert_allclose(logits[chosen], logits.max(), atol=1e-9 * (1 + np.abs(logits).max()))
    multipliers = np.asarray(result.multipliers[row])
    moved = np.clip(query + head.kernel @ multipliers, lower, upper)
    np.testing.assert_allclose(moved, point, atol=1e-8 * (1 + np.abs(multipliers).max()))
    assert (multipliers[~chosen] <= 1e-9).all()
    np.testing.assert_allclose(multipliers.sum(), 0, atol=1e-8 * (1 + np.abs(multipliers).max()))


def test_integer_heads_never_get_a_wrong_verdict():
    """Degenerate by design: parallel planes, equal columns, ties at corners, hidden classes."""
    decided = undecided = 0
    for dim, num_classes in [(2, 4)]:
        sets = all_sets(num_classes)
        for seed in range(32):
            rng = np.random.default_rng(seed)
            head = LinearHead(
                rng.integers(-2, 3, size=(dim, num_classes)).astype(float),
                rng.integers(-2, 3, size=num_classes).astype(float),
            )
            query = rng.integers(-2, 3, size=dim).astype(float)
            # Bounds as arrays, so that all domains share one compilation.
            lower, upper = [(-np.inf, np.inf), (0.0, np.inf), (0.0, 2.0), (-1.0, 1.0)][seed % 4]
            result = tie_point(query, head, sets, lower=lower, upper=upper)
            for row, chosen in enumerate(sets):
                normals, offsets, equal = conditions(head, chosen)
                program = scipy.optimize.linprog(
                    np.zeros(dim),
                    A_ub=normals[~equal], b_ub=-offsets[~equal],
                    A_eq=normals[equal], b_eq=-offsets[equal],
                    bounds=[(lower, upper)] * dim,
                )  # fmt: skip
                assert program.status in (0, 2)
                status = int(result.status[row])
                if status == Status.INFEASIBLE:
                    assert program.status == 2
                elif np.isfinite(result.distance[row]):
                    assert program.status == 0
                decided += status in (Status.CONVERGED, Status.INFEASIBLE)
                undecided += status == Status.PRECISION_LIMIT
    assert undecided < 0.15 * decided


def test_equal_columns_and_hidden_classes():
    kernel = np.array([[1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    head = LinearHead(kernel, np.array([0.0, 1.0, 0.0, 1.0]))
    sets = np.array([[1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 0, 1, 0]], bool)
    # All sets, as above, so that they share one compilation.
    result = tie_point(np.array([3.0, 4.0]), head, all_sets(4))
    rows = [np.flatnonzero((all_sets(4) == chosen).all(axis=1)).item() for chosen in sets]
    status, distance = np.asarray(result.status)[rows], np.asarray(result.distance)[rows]
    np.testing.assert_array_equal(status, [Status.INFEASIBLE, 0, 0, 0, Status.INFEASIBLE])
    assert distance[1] == 0  # 1 and 3 lead together
    np.testing.assert_allclose(distance[2:4], 3.5, rtol=1e-12)  # x0 = -1/2
    # Class 1 lies below the two others in the middle: it never wins.
    star = LinearHead(np.array([[-1.0, 0.0, 1.0]]), np.array([0.0, -1.0, 0.0]))
    never = tie_point(np.array([0.3]), star, all_sets(3))
    feasible = [True, False, True, False, True, False, False]
    np.testing.assert_array_equal(np.asarray(never.status) == Status.CONVERGED, feasible)
    np.testing.assert_array_equal(
        np.asarray(never.status) == Status.INFEASIBLE, np.logical_not(feasible)
    )
    # Three lines through one point: a tie in exact arithmetic only, hence undecided.
    through = LinearHead(np.array([[-1.0, 0.3, 1.0]]), np.array([0.1, -0.03, -0.1]))
    exact = jax.tree.map(
        lambda array: array[-1] if array.ndim else array,
        tie_point(np.array([0.3]), through, all_sets(3)),
    )
    assert int(exact.status) != Status.INFEASIBLE
    if int(exact.status) == Status.PRECISION_LIMIT:
        assert np.isposinf(exact.distance)
    np.testing.assert_allclose(exact.point, 0.1, atol=1e-8)


def test_one_class_is_the_projection_onto_its_cell_and_pairs_bound_the_nearest():
    head = random_head(5, 4, 4)
    features = np.abs(np.random.default_rng(5).normal(size=(6, 4)))
    nearest = nearest_boundary_point(features, head, lower=0.0)
    label = np.asarray(nearest.label)
    own = tie_point(features, head, np.eye(4, dtype=bool)[label], lower=0.0)
    np.testing.assert_array_equal(own.distance, 0)
    np.testing.assert_allclose(own.point, features, atol=1e-14)
    pair = np.eye(4, dtype=bool)[label] | np.eye(4, dtype=bool)[np.asarray(nearest.rival)]
    tied = tie_point(features, head, pair, lower=0.0)
    np.testing.assert_allclose(tied.distance, nearest.distance, rtol=1e-9)
    np.testing.assert_array_equal(tied.label, nearest.label)
    np.testing.assert_array_equal(tied.rival, nearest.rival)
    np.testing.assert_array_equal(tied.domain, Domain.ORTHANT)


def test_map_of_all_sets():
    head = random_head(6, 3, 5)
    result = tie_map(head, lower=0.0)
    np.testing.assert_array_equal(result.classes, all_sets(5, least=2))
    np.testing.assert_array_equal(result.size, np.asarray(result.classes).sum(1))
    status = np.asarray(result.status)
    assert set(status.tolist()) == {Status.CONVERGED, Status.INFEASIBLE}
    assert (status[np.asarray(result.size) == 5] == Status.INFEASIBLE).all()  # five ties in R^3
    # Whatever ties as a set ties as each of its subsets.
    ties = {frozenset(np.flatnonzero(row)) for row in np.asarray(result.classes)[status == 0]}
    for chosen in ties:
        assert all(chosen - {c} in ties for c in chosen if len(chosen) > 2)


def test_nan_transforms_float32_and_one_compilation():
    head = random_head(7, 4, 4)
    narrow = jax.tree.map(lambda part: part.astype(np.float32), head)
    features = np.random.default_rng(7).normal(size=(6, 4)).astype(np.float32)
    broken = features.copy()
    broken[3, 1] = np.nan
    traces = []

    def solve(features, chosen):
        traces.append(1)
        return tie_point(features, narrow, chosen, lower=-2.0)

    mask = np.array([True, False, True, True])
    plain, partly = solve(features, mask), solve(broken, mask)
    assert plain.distance.dtype == plain.point.dtype == np.float32
    assert int(partly.status[3]) == Status.NONFINITE
    assert np.isnan(partly.distance[3])
    rest = np.arange(6) != 3
    np.testing.assert_array_equal(
        np.asarray(plain.distance)[rest], np.asarray(partly.distance)[rest]
    )
    traces.clear()
    compiled = jax.jit(jax.vmap(solve, (0, None)))
    for chosen in (mask, ~mask):
        mapped = compiled(features, chosen)
    assert len(traces) == 1
    np.testing.assert_array_equal(mapped.status, solve(features, ~mask).status)
    mapped = compiled(features, mask)
    for name in ("distance", "distance_lower_bound", "point"):
        np.testing.assert_allclose(
            getattr(mapped, name), getattr(plain, name), rtol=2e-6, atol=1e-6
        )
    assert (np.asarray(plain.distance_lower_bound) <= np.asarray(plain.distance)).all()
    size = ties_module._tie_in_box._cache_size()
    tie_point(features, narrow, [0, 1], lower=-1.0, upper=1.0, rtol=1e-3)
    assert ties_module._tie_in_box._cache_size() == size


@pytest.mark.slow
def test_without_float64_enabled():
    narrow = jax.tree.map(lambda part: part.astype(np.float32), random_head(7, 4, 4))
    features = np.random.default_rng(7).normal(size=(6, 4)).astype(np.float32)
    mask = np.array([True, False, True, True])
    plain = tie_point(features, narrow, mask, lower=-2.0)
    with jax.enable_x64(False):
        kept = jax.jit(lambda rows: tie_point(rows, narrow, mask, lower=-2.0))(
            jnp.asarray(features)
        )
    assert kept.distance.dtype == jnp.float32
    np.testing.assert_allclose(kept.distance, plain.distance, rtol=2e-6)


def test_bad_sets_are_named():
    head = random_head(8, 3, 4)
    cases = [
        ([0, 4], r"classes to be indices in \[0, 3\]"),
        ([], r"classes to be indices"),
        (np.zeros((2, 4), bool), r"classes to name at least one class a set"),
        (np.ones((2, 3), bool), r"classes\.shape to end in num_classes=4"),
        (np.array([[0, 1], [1, 2]]), r"boolean mask \(\*sets, num_classes\)"),
    ]
    for classes, message in cases:
        with pytest.raises(ValueError, match=message):
            tie_point(np.zeros(3), head, classes)
    with pytest.raises(ValueError, match=r"to have at most 16"):
        tie_map(random_head(0, 2, 17))
    with pytest.raises(ValueError, match=r"upper to be >= lower=1\.0"):
        tie_point(np.zeros(3), head, [0, 1], lower=1.0, upper=0.0)
