"""Enclosures of the certificate against exact rational arithmetic."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hullgeo import certificate

CASES = 30  # one compiled program each for float32 and float64


def exact(array):
    return [[Fraction(float(x)) for x in row] for row in np.atleast_2d(np.asarray(array))]


def dot(left, right):
    return sum((a * b for a, b in zip(left, right, strict=True)), Fraction(0))


def problem(seed, dtype):
    """Vertices far from the origin and a query close to a point of the hull: rounding matters."""
    rng = np.random.default_rng(seed)
    vertices = rng.normal(size=(12, 5)) + rng.choice([0.0, 10.0, 1e4])
    vertices *= rng.choice([1e-20, 1.0, 1e20])
    weights = rng.dirichlet(np.full(12, 0.3))
    weights[weights < 0.02] = 0
    near = rng.choice([1.0, 1e-3, 1e-9])
    query = weights @ vertices / weights.sum() + near * (vertices[0] - vertices[1])
    return vertices.astype(dtype), query.astype(dtype), weights


@jax.jit
def enclose(vertices, query, weights):
    hull = certificate.center_vertices(vertices)
    rows = certificate.residual_rows(hull, query, jnp.arange(12, dtype=jnp.int32))
    residual, error, upper = certificate.upper_bound(rows, weights, hull.flushed)
    score, length = certificate.lower_score(hull, query, residual)
    proof = certificate.certify(
        hull, query, jnp.arange(12, dtype=jnp.int32), weights, vertices.dtype
    )
    return hull.scale, residual, error, upper, score, length, proof


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_bound_holds_in_exact_arithmetic(dtype):
    tight = []
    for seed in range(CASES):
        vertices, query, weights = problem(seed, dtype)
        scale, residual, error, upper, score, length, proof = jax.device_get(
            enclose(vertices, query, weights)
        )
        scale = Fraction(float(scale))
        rows = [
            [(v - q) / scale for v, q in zip(row, exact(query)[0], strict=True)]
            for row in exact(vertices)
        ]
        total = sum(exact(weights)[0])
        true = [dot(exact(weights)[0], column) / total for column in zip(*rows, strict=True)]
        off = [a - b for a, b in zip(true, exact(residual)[0], strict=True)]
        assert dot(off, off) <= Fraction(float(error)) ** 2
        assert dot(true, true) <= Fraction(float(upper)) ** 2
        direction = exact(residual)[0]
        least = min(dot(row, direction) for row in rows)
        assert Fraction(float(score)) <= least
        assert Fraction(float(length)) ** 2 >= dot(direction, direction)

        assert Fraction(float(proof.distance)) ** 2 >= dot(true, true) * scale**2
        lower = Fraction(float(proof.lower))
        if least > 0:
            assert lower**2 * dot(direction, direction) <= least**2 * scale**2 * (1 + 2**-40)
        else:
            assert lower == 0
        returned = exact(proof.weights)[0]
        rounded = [dot(returned, column) / sum(returned) for column in zip(*rows, strict=True)]
        gap = dot(rounded, rounded) - min(dot(row, rounded) for row in rows)
        assert Fraction(float(proof.gap)) >= gap * scale**2
        tight.append(float(gap * scale**2) / float(proof.gap))
    assert np.median(tight) > 0.99


def test_query_at_a_vertex_has_distance_exactly_zero():
    vertices, _, _ = problem(0, np.float64)
    proof = enclose(vertices, vertices[3], np.eye(12)[3])[-1]
    assert proof.distance == 0
    assert proof.lower == 0


def test_rounding_bound_is_needed(monkeypatch):
    """The exact checks above notice when the bounds are left out."""
    monkeypatch.setattr(certificate, "_gamma", lambda terms: 0.0)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        test_every_bound_holds_in_exact_arithmetic(np.float64)
    jax.clear_caches()
