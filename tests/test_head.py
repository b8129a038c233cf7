"""Closed forms of the linear head against dense sampling, linear programs and known geometry."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hullgeo
from hullgeo import LinearHead, Status, boundary_distance, segment_classes
from hullgeo import head as head_module


def random_head(seed, dim, num_classes, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return LinearHead(
        rng.normal(size=(dim, num_classes)).astype(dtype),
        rng.normal(size=num_classes).astype(dtype),
    )


def logits_of(features, head):
    kernel, bias = (np.asarray(part, np.float64) for part in head)
    return np.asarray(features, np.float64) @ kernel + bias


# --- boundary_distance ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@hypothesis.given(
    seed=st.integers(0, 10**6), dim=st.sampled_from([1, 6]), num_classes=st.sampled_from([2, 5])
)
def test_ball_has_one_class_and_touches_the_boundary(dtype, seed, dim, num_classes):
    head = random_head(seed, dim, num_classes, dtype)
    rng = np.random.default_rng(seed + 1)
    features = rng.normal(size=(20, dim)).astype(dtype)
    result = boundary_distance(features, head)
    assert result.distance.dtype == dtype
    logits = logits_of(features, head)
    np.testing.assert_array_equal(result.label, logits.argmax(-1))
    # Straight towards the rival's plane the class changes at the distance, and not before.
    kernel = np.asarray(head.kernel, np.float64)
    normal = (kernel[:, result.rival] - kernel[:, result.label]).T
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    normal /= length
    distance = np.asarray(result.distance, np.float64)[:, None]
    scale = 1 + np.abs(features.astype(np.float64)).max() + distance
    tolerance = 8 * np.finfo(dtype).eps * scale * (1 + np.abs(kernel).max() / length) * dim
    touched = logits_of(features + normal * (distance + tolerance), head)
    label = np.asarray(result.label)
    assert (touched.argmax(-1) != label).all()
    # On spheres just below the distance, no sampled point has another class.
    directions = rng.normal(size=(200, 1, dim))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    around = logits_of(features + directions * distance * (1 - 1e-9), head)
    assert (around.argmax(-1) == label).all()


def test_known_distances():
    head = LinearHead(np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 2.0]]), np.zeros(3))
    result = boundary_distance(np.array([[3.0, 0.0], [0.0, 0.0], [1.0, 0.25]]), head)
    # 3 - 2y = 0 along (1, -2) / sqrt(5); the origin is a tie of all; (1 - .5) / sqrt(5).
    np.testing.assert_allclose(
        result.distance, [3 / np.sqrt(5), 0.0, 0.5 / np.sqrt(5)], rtol=1e-14, atol=1e-15
    )
    np.testing.assert_array_equal(result.label, [0, 0, 0])
    np.testing.assert_array_equal(np.asarray(result.rival)[[0, 2]], [2, 2])


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
def test_distance_is_never_above_the_exact_rational(scale):
    from fractions import Fraction

    rng = np.random.default_rng(3)
    kernel = (rng.normal(size=(6, 4)) * scale).astype(np.float32)
    kernel[:, 3] = np.nextafter(kernel[:, 2], np.float32(np.inf))  # almost parallel classes
    bias = (rng.normal(size=4) * scale).astype(np.float32)
    features = rng.normal(size=(40, 6)).astype(np.float32)
    result = boundary_distance(features, LinearHead(kernel, bias))

    def exact(row):
        z = [
            sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(row, column, strict=True)),
                Fraction(float(offset)))
            for column, offset in zip(kernel.T, bias, strict=True)
        ]  # fmt: skip
        top = max(range(4), key=lambda j: z[j])
        squares = []
        for j in range(4):
            length = sum((Fraction(float(a)) - Fraction(float(b))) ** 2
                         for a, b in zip(kernel[:, top], kernel[:, j], strict=True))  # fmt: skip
            if j != top:
                squares.append((z[top] - z[j]) ** 2 / length)
        return top, min(squares)

    for row, distance, label in zip(features, result.distance, result.label, strict=True):
        top, square = exact(row)
        claimed = Fraction(float(distance)) ** 2
        assert claimed <= square
        if label == top:
            assert claimed >= square * (1 - Fraction(1, 10**6)) or square < Fraction(1, 10**12)


def test_equal_columns_never_meet_unless_biases_tie():
    kernel = np.array([[1.0, 1.0, 1.0]])
    features = np.array([[-7.0], [0.3]])
    apart = boundary_distance(features, LinearHead(kernel, np.array([0.0, 2.0, 1.0])))
    assert np.isposinf(np.asarray(apart.distance)).all()
    np.testing.assert_array_equal(apart.label, 1)
    np.testing.assert_array_equal(apart.rival, 1)
    tied = boundary_distance(features, LinearHead(kernel, np.array([0.0, 2.0, 2.0])))
    np.testing.assert_array_equal(tied.distance, 0)
    np.testing.assert_array_equal(tied.label, 1)
    np.testing.assert_array_equal(tied.rival, 2)


def test_one_class_has_no_boundary():
    head = LinearHead(np.ones((3, 1)), np.zeros(1))
    result = boundary_distance(np.ones(3), head)
    assert np.isposinf(result.distance)
    classes = segment_classes(np.zeros(3), np.ones(3), head)
    assert classes.position.shape == (0,)
    np.testing.assert_array_equal(classes.classes, [0])
    assert segment_classes(np.zeros((0, 3)), np.zeros((0, 3)), head).position.shape == (0, 0)


def test_nan_rows_leave_the_others_right():
    head = random_head(0, 4, 3)
    features = np.random.default_rng(0).normal(size=(5, 4))
    broken = features.copy()
    broken[1, 2], broken[3, 0] = np.nan, np.inf
    whole, partly = boundary_distance(features, head), boundary_distance(broken, head)
    np.testing.assert_array_equal(partly.status, [0, Status.NONFINITE, 0, Status.NONFINITE, 0])
    for name in ("distance", "label", "rival"):
        np.testing.assert_array_equal(getattr(whole, name)[::2], getattr(partly, name)[::2])
    assert np.isnan(partly.distance[1])
    lines = segment_classes(broken, features + 1, head)
    expected = segment_classes(features, features + 1, head)
    np.testing.assert_array_equal(lines.status, partly.status)
    np.testing.assert_array_equal(lines.position[::2], expected.position[::2])


def test_gradient_is_the_unit_normal_and_matches_differences():
    head = random_head(5, 6, 4)
    features = np.random.default_rng(6).normal(size=(3, 6))

    def total(features, kernel, bias):
        return jnp.sum(boundary_distance(features, LinearHead(kernel, bias)).distance)

    arguments = (jnp.asarray(features), jnp.asarray(head.kernel), jnp.asarray(head.bias))
    gradient = jax.grad(total, (0, 1, 2))(*arguments)
    np.testing.assert_allclose(np.linalg.norm(gradient[0], axis=-1), 1, rtol=1e-12)
    rng = np.random.default_rng(7)
    directions = [rng.normal(size=part.shape) for part in arguments]
    step = 1e-6
    ahead, behind = (
        total(*(a + sign * step * d for a, d in zip(arguments, directions, strict=True)))
        for sign in (1, -1)
    )
    predicted = sum(np.sum(g * d) for g, d in zip(gradient, directions, strict=True))
    np.testing.assert_allclose((ahead - behind) / (2 * step), predicted, rtol=1e-6)
    tangent = jax.jvp(total, arguments, tuple(jnp.asarray(d) for d in directions))[1]
    np.testing.assert_allclose(tangent, predicted, rtol=1e-10)


# --- segment_classes -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@hypothesis.given(
    seed=st.integers(0, 10**6), dim=st.sampled_from([1, 3]), num_classes=st.sampled_from([2, 6])
)
def test_segments_agree_with_dense_sampling(dtype, seed, dim, num_classes):
    head = random_head(seed, dim, num_classes, dtype)
    rng = np.random.default_rng(seed + 1)
    start, end = rng.normal(scale=3, size=(2, 20, dim)).astype(dtype)
    result = segment_classes(start, end, head)
    assert result.position.shape == (20, num_classes - 1)
    assert result.classes.shape == (20, num_classes)
    positions = np.linspace(0, 1, 401)
    for row in range(20):
        count = int(result.num_crossings[row])
        corners = np.asarray(result.position[row], np.float64)
        classes = np.asarray(result.classes[row])
        assert (np.diff(corners) >= 0).all()
        assert (classes[1 : count + 1] != classes[:count]).all()
        assert (classes[count:] == classes[count]).all()
        assert (corners[count:] == (corners[count - 1] if count else 1)).all()
        line = start[row] + positions[:, None] * (end[row].astype(np.float64) - start[row])
        sampled = logits_of(line, head)
        claimed = classes[np.searchsorted(corners[:count], positions)]
        loss = sampled.max(-1) - np.take_along_axis(sampled, claimed[:, None], -1)[:, 0]
        assert loss.max() <= 100 * np.finfo(dtype).eps * (1 + np.abs(sampled).max())


def test_all_classes_in_turn_and_ties():
    # Tangents of a parabola: class j leads around t = j / 4, so all five come in turn.
    nodes = np.arange(5) / 4
    head = LinearHead(2 * nodes[None, :], -(nodes**2))
    result = segment_classes(np.zeros(1), np.ones(1), head)
    np.testing.assert_array_equal(result.classes, np.arange(5))
    np.testing.assert_allclose(result.position, (nodes[1:] + nodes[:-1]) / 2, rtol=1e-15)
    back = segment_classes(np.ones(1), np.zeros(1), head)
    np.testing.assert_array_equal(back.classes, np.arange(5)[::-1])
    # Three lines through one point: the middle one never leads, one crossing only.
    star = LinearHead(np.array([[-1.0, 0.0, 1.0]]), np.array([0.5, 0.0, -0.5]))
    result = segment_classes(np.zeros(1), np.ones(1), star)
    np.testing.assert_array_equal(result.classes, [0, 2, 2])
    np.testing.assert_array_equal(result.position, [0.5, 0.5])
    # Equal lines: the smaller index is named, and no crossing between them is made up.
    twins = LinearHead(np.array([[-1.0, 1.0, 1.0]]), np.array([0.5, -0.5, -0.5]))
    result = segment_classes(np.zeros(1), np.ones(1), twins)
    np.testing.assert_array_equal(result.classes, [0, 1, 1])
    assert int(result.num_crossings) == 1
    # A tie at the start is decided by what comes just after it; one at the end is no crossing.
    level = LinearHead(np.array([[-1.0, 0.0, 1.0]]), np.zeros(3))
    result = segment_classes(np.zeros((2, 1)), np.array([[1.0], [-1.0]]), level)
    np.testing.assert_array_equal(np.asarray(result.classes)[:, 0], [2, 0])
    np.testing.assert_array_equal(result.num_crossings, 0)
    result = segment_classes(np.ones(1), np.zeros(1), level)
    assert int(result.num_crossings) == 0


def test_zero_length_segments_have_one_class():
    head = random_head(1, 3, 4)
    points = np.random.default_rng(1).normal(size=(6, 3))
    result = segment_classes(points, points, head)
    np.testing.assert_array_equal(result.num_crossings, 0)
    np.testing.assert_array_equal(result.position, 1)
    np.testing.assert_array_equal(result.classes[:, 0], logits_of(points, head).argmax(-1))
    np.testing.assert_array_equal(result.status, Status.CONVERGED)


# --- both ----------------------------------------------------------------------------------------


def test_transforms_agree_and_compile_once():
    head = random_head(2, 5, 4, np.float32)
    features = np.random.default_rng(2).normal(size=(2, 5)).astype(np.float32)
    other = features[::-1].copy()
    traces = []

    def both(a, b, head):
        traces.append(1)
        return boundary_distance(a, head), segment_classes(a, b, head)

    plain = both(features, other, head)
    traces.clear()
    compiled = jax.jit(both)
    for _ in range(2):
        jitted = compiled(features, other, head)
    assert len(traces) == 1
    looped = jax.tree.map(
        lambda *rows: np.stack(rows),
        *[both(a, b, head) for a, b in zip(features, other, strict=True)],
    )
    mapped = jax.jit(jax.vmap(both, (0, 0, None)))(features, other, head)
    for variant in (jitted, looped, mapped):
        for left, right in zip(jax.tree.leaves(plain), jax.tree.leaves(variant), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-6)
    before = head_module._segment_classes._cache_size()
    segment_classes(other, features, head)
    assert head_module._segment_classes._cache_size() == before


def test_without_the_float64_flag():
    head = random_head(4, 5, 4)
    features = np.random.default_rng(4).normal(size=(6, 5))
    narrow = jax.tree.map(lambda a: a.astype(np.float32), (features, head))
    wide_result = boundary_distance(features, head)
    with jax.enable_x64(False):
        assert boundary_distance(*narrow).distance.dtype == jnp.float32
        kept = boundary_distance(features, head)  # NumPy float64 is not rounded on the way in
        inside = jax.jit(lambda a, b: (boundary_distance(a, b), segment_classes(a, -a, b)))(*narrow)
        gradient = jax.grad(lambda a: boundary_distance(a, narrow[1]).distance.sum())(narrow[0])
    assert kept.distance.dtype == np.float64
    np.testing.assert_array_equal(kept.distance, wide_result.distance)
    assert inside[0].distance.dtype == inside[1].position.dtype == gradient.dtype == jnp.float32


def test_bad_input_is_named():
    head = random_head(0, 3, 4)
    with pytest.raises(ValueError, match=r"features\.shape to end in dim=3"):
        boundary_distance(np.zeros((2, 5)), head)
    bad = LinearHead(np.where(np.eye(3, 4) > 0, np.nan, head.kernel), head.bias)
    with pytest.raises(ValueError, match=r"Expected head\.kernel\[0, 0\] to be finite"):
        boundary_distance(np.zeros(3), bad)
    with pytest.raises(ValueError, match=r"head\.bias\.shape to be \(4,\)"):
        boundary_distance(np.zeros(3), LinearHead(head.kernel, np.zeros(3)))


def test_public_names():
    assert {"boundary_distance", "segment_classes"} <= set(dir(hullgeo))
