"""Cells and facets against brute force in the plane, exact geometry and HiGHS on every pair."""

import numpy as np
import pytest
import scipy.optimize

from hullgeo import Domain, Evidence, LinearHead, Status, partition


def random_head(seed, dim, num_classes):
    rng = np.random.default_rng(seed)
    return LinearHead(rng.normal(size=(dim, num_classes)), 0.5 * rng.normal(size=num_classes))


def program(head, one, two, lower, upper):
    """HiGHS on its own: the largest margin over all rows at once, no scaling, no cells."""
    kernel, bias = head
    dim, num_classes = kernel.shape
    others = [i for i in range(num_classes) if i not in (one, two)]
    normals = (kernel[:, others] - kernel[:, [one]]).T
    lengths = np.linalg.norm(normals, axis=1)
    rows = np.column_stack([normals, lengths])
    limits = bias[one] - bias[others]
    sides = [(-np.eye(dim)[m], -lower[m]) for m in range(dim) if np.isfinite(lower[m])]
    sides += [(np.eye(dim)[m], upper[m]) for m in range(dim) if np.isfinite(upper[m])]
    for row, limit in sides:
        rows, limits = np.vstack([rows, [*row, 1.0]]), np.append(limits, limit)
    equal = {}
    if two is not None:
        equal = {
            "A_eq": [[*(kernel[:, one] - kernel[:, two]), 0.0]], "b_eq": [bias[two] - bias[one]]
        }  # fmt: skip
    found = scipy.optimize.linprog(
        [*np.zeros(dim), -1.0], rows, limits, bounds=[(None, None)] * dim + [(None, 1.0)], **equal
    )
    return found.x[-1] if found.status == 0 else -np.inf


def check_witnesses(result, head, lower, upper):
    kernel, bias = (np.asarray(part, np.float64) for part in head)
    facet = np.asarray(result.facet)
    np.testing.assert_array_equal(facet, facet.T)
    for one, two in np.argwhere(facet):
        point = np.asarray(result.witness[one, two], np.float64)
        logits = point @ kernel + bias
        others = np.delete(logits, [one, two])
        scale = 1e-12 * (1 + np.abs(logits).max())
        np.testing.assert_allclose(logits[one], logits[two], atol=scale)
        assert (others < logits[one]).all()
        assert float(result.margin[one, two]) > 0
        lengths = [
            np.linalg.norm(np.delete(kernel, [one, two], 1) - kernel[:, [own]], axis=0)
            for own in (one, two)
        ]
        away = np.min((logits[one] - others) / np.minimum(*lengths), initial=np.inf)
        sides = np.minimum(point - lower, upper - point).min()
        assert float(result.margin[one, two]) <= min(away, sides) + 1e-12
    assert np.isnan(np.asarray(result.witness)[~facet]).all()


def check_proofs(result, head, lower, upper):
    """The multipliers as published, on a box: negative sums at every corner."""
    kernel, bias = head
    assert len(result.absent) > 0
    for (one, two), classes, values in zip(
        np.asarray(result.absent),
        np.asarray(result.absent_classes),
        np.asarray(result.absent_multipliers),
        strict=True,
    ):
        used = (values != 0) & (classes != one)
        normals = kernel[:, classes[used]] - kernel[:, [one]]
        lengths = np.linalg.norm(normals, axis=0)
        weights = values[used] / lengths
        assert (weights[classes[used] != two] <= 0).all()
        pull = normals @ weights
        most = np.maximum(pull * lower, pull * upper).sum()
        assert most + (bias[classes[used]] - bias[one]) @ weights < 0


@pytest.mark.parametrize(
    ("lower", "upper", "kind"),
    [(None, None, Domain.SPACE), (0.0, None, Domain.ORTHANT), (-0.5, 1.0, Domain.BOX)],
)
def test_agrees_with_highs_on_every_pair(lower, upper, kind):
    dim, num_classes = 3, 8
    low = np.full(dim, -np.inf if lower is None else lower)
    high = np.full(dim, np.inf if upper is None else upper)
    for seed in range(3):
        head = random_head(seed, dim, num_classes)
        result = partition(head, lower=lower, upper=upper)
        assert int(result.domain) == kind
        np.testing.assert_array_equal(result.status, Status.CONVERGED)
        np.testing.assert_array_equal(result.cell_status, Status.CONVERGED)
        for one in range(num_classes):
            radius = program(head, one, None, low, high)
            assert bool(result.nonempty[one]) == (radius > 0)
            np.testing.assert_allclose(
                np.minimum(result.radius[one], 1.0), max(radius, 0.0), atol=1e-7
            )
            for two in range(one):
                margin = program(head, one, two, low, high)
                assert bool(result.facet[one, two]) == (margin > 0)
        check_witnesses(result, head, low, high)
        if kind == Domain.BOX:
            check_proofs(result, head, low, high)
            np.testing.assert_array_equal(result.bounded, True)
        assert sum(result.counts.values()) == num_classes * (num_classes - 1) // 2


def test_plane_by_brute_force():
    head = random_head(12, 2, 7)
    result = partition(head, lower=-4.0, upper=4.0)
    side = np.linspace(-4, 4, 1601)
    logits = np.stack(np.meshgrid(side, side, indexing="ij"), -1) @ head.kernel + head.bias
    label = logits.argmax(-1)
    assert set(np.unique(label)) <= set(np.flatnonzero(result.nonempty))
    seen = np.zeros((7, 7), bool)
    for left, right in [(label[1:], label[:-1]), (label[:, 1:], label[:, :-1])]:
        seen[left, right] = seen[right, left] = True
    np.fill_diagonal(seen, False)
    long = np.asarray(result.margin) > 0.02  # longer than the grid can miss
    assert (seen[long]).all()
    # What the grid sees between cells that share no facet is a corner.
    assert (seen & ~np.asarray(result.facet)).sum() <= 4


def test_known_cells():
    # Four quadrant-like cells around the origin and a square between them, in the plane.
    kernel = np.array([[1.0, -1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0, 0.0]])
    head = LinearHead(kernel, np.array([0.0, 0.0, 0.0, 0.0, 1.0]))
    result = partition(head)
    np.testing.assert_array_equal(result.nonempty, True)
    np.testing.assert_array_equal(result.bounded, [False, False, False, False, True])
    np.testing.assert_allclose(result.center[4], 0.0, atol=1e-9)
    np.testing.assert_allclose(result.radius[4], 1.0, rtol=1e-9)
    assert np.isposinf(np.asarray(result.radius)[:4]).all()
    expected = np.zeros((5, 5), bool)
    expected[4, :4] = expected[:4, 4] = True
    for one, two in [(0, 2), (0, 3), (1, 2), (1, 3)]:
        expected[one, two] = expected[two, one] = True
    np.testing.assert_array_equal(result.facet, expected)
    assert int(result.status[0, 1]) == Status.CONVERGED  # opposite cells, kept apart by the square
    assert int(result.evidence[0, 1]) == Evidence.FARKAS
    quadrant = partition(head, lower=0.0)
    np.testing.assert_array_equal(quadrant.nonempty[4], True)
    np.testing.assert_allclose(quadrant.radius[4], 0.5, rtol=1e-9)
    # In the orthant class 1 (z = -x) leads nowhere: the square's class is always higher.
    np.testing.assert_array_equal(quadrant.nonempty, [True, False, True, False, True])
    assert int(quadrant.evidence[1, 4]) == Evidence.EMPTY_CELL


def test_a_strip_is_unbounded_with_a_finite_ball():
    head = LinearHead(np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]), np.array([0.0, 0.0, 1.0]))
    result = partition(head)
    np.testing.assert_array_equal(result.nonempty, True)
    np.testing.assert_allclose(result.radius[2], 1.0, rtol=1e-9)
    assert not bool(result.bounded[2])


def test_degenerate_heads():
    line = LinearHead(np.array([[-1.0, 0.0, 1.0]]), np.array([0.0, -1.0, 0.0]))
    result = partition(line)
    np.testing.assert_array_equal(result.nonempty, [True, False, True])
    np.testing.assert_array_equal(result.facet, [[0, 0, 1], [0, 0, 0], [1, 0, 0]])
    equal = LinearHead(np.array([[1.0, 1.0, -1.0, 1.0]]), np.array([0.0, 1.0, 0.0, 1.0]))
    result = partition(equal)
    np.testing.assert_array_equal(result.nonempty, [False, True, True, True])
    np.testing.assert_array_equal(
        result.facet, [[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]]
    )
    assert int(result.evidence[1, 3]) == Evidence.SAME_COLUMN
    np.testing.assert_array_equal(result.center[1], result.center[3])
    lone = partition(LinearHead(np.ones((3, 1)), np.zeros(1)), lower=0.0, upper=1.0)
    np.testing.assert_array_equal(lone.nonempty, [True])
    np.testing.assert_allclose(lone.radius, 0.5)
    # Three lines through one point: the middle cell is that point, which nobody can prove.
    touching = partition(LinearHead(np.array([[-1.0, 0.3, 1.0]]), np.array([0.1, -0.03, -0.1])))
    assert int(touching.cell_status[1]) == Status.PRECISION_LIMIT
    assert not bool(touching.facet[0, 1])


def test_fixed_coordinates_and_scales():
    head = random_head(5, 3, 5)
    low, high = np.array([0.3, -1.0, -1.0]), np.array([0.3, 1.0, 1.0])
    result = partition(head, lower=low, upper=high)
    flat = partition(
        LinearHead(head.kernel[1:], head.bias + 0.3 * head.kernel[0]), lower=-1.0, upper=1.0
    )
    np.testing.assert_array_equal(result.nonempty, flat.nonempty)
    np.testing.assert_array_equal(result.facet, flat.facet)
    for scale in (2.0**-60, 2.0**60):
        scaled = partition(
            LinearHead(head.kernel, head.bias * scale), lower=low * scale, upper=high * scale
        )
        np.testing.assert_array_equal(scaled.facet, result.facet)
        np.testing.assert_allclose(
            np.asarray(scaled.radius) / scale, result.radius, rtol=1e-6, atol=1e-9
        )


def test_within_a_hull():
    rng = np.random.default_rng(3)
    head = random_head(3, 3, 6)
    vertices = rng.normal(size=(40, 3))
    result = partition(head, hull=vertices)
    assert int(result.domain) == Domain.HULL
    np.testing.assert_array_equal(result.status, Status.CONVERGED)
    logits = vertices @ head.kernel + head.bias
    for one in range(6):
        for two in range(one + 1):
            others = [i for i in range(6) if i not in (one, two)]
            lengths = np.linalg.norm(head.kernel[:, others] - head.kernel[:, [one]], axis=0)
            rows = np.column_stack(
                [((logits[:, others] - logits[:, [one]]) / lengths).T, np.ones(len(others))]
            )
            equal = [[*np.ones(40), 0.0]]
            if one != two:
                equal.append([*(logits[:, one] - logits[:, two]), 0.0])
            found = scipy.optimize.linprog(
                [*np.zeros(40), -1.0], rows, np.zeros(len(others)), equal, [1.0, 0.0][: len(equal)],
                bounds=[(0, None)] * 40 + [(None, None)],
            )  # fmt: skip
            margin = found.x[-1] if found.status == 0 else -np.inf
            if one == two:
                assert bool(result.nonempty[one]) == (margin > 0)
                np.testing.assert_allclose(result.radius[one], max(margin, 0.0), atol=1e-7)
            else:
                assert bool(result.facet[one, two]) == (margin > 0)
    check_witnesses(result, head, -np.inf, np.inf)
    facet = np.asarray(result.facet)
    assert facet.any()
    inside = scipy.optimize.linprog  # each witness is a mixture of the vertices
    for point in np.asarray(result.witness)[facet]:
        found = inside(np.zeros(40), A_eq=np.vstack([vertices.T, np.ones(40)]), b_eq=[*point, 1.0])
        assert found.status == 0


@pytest.mark.parametrize("num_classes", [40, pytest.param(100, marks=pytest.mark.slow)])
def test_many_classes_are_decided_with_few_programs(num_classes):
    head = random_head(7, 16, num_classes)
    result = partition(head, lower=0.0, upper=3.0)
    counts = result.counts
    assert counts["undecided"] == 0
    assert counts["program"] + counts["farkas"] < 0.7 * sum(counts.values())
    check_witnesses(result, head, 0.0, 3.0)


def test_float32_heads_and_bad_input():
    head = random_head(8, 3, 4)
    narrow = LinearHead(*(part.astype(np.float32) for part in head))
    result = partition(
        narrow, lower=0.0, features=np.abs(np.random.default_rng(0).normal(size=(9, 3)))
    )
    assert result.witness.dtype == result.radius.dtype == np.float32
    with pytest.raises(ValueError, match=r"upper to be >= lower"):
        partition(head, lower=1.0, upper=0.0)
    with pytest.raises(ValueError, match=r"hull\.shape to be \(vertices, 3\)"):
        partition(head, hull=np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"head\.bias\[0\] to be finite"):
        partition(LinearHead(head.kernel, np.full(4, np.nan)))
