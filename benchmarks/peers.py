"""Other people's ways to the nearest point of a convex hull, each in its best formulation.

The formulation decides more than the solver. For U = V - q,

    separating hyperplane:  min |w|^2 / 2  with  <w, u_i> >= 1;   weights = multipliers / sum
    homogenised NNLS:       min |U' a|^2 + (1'a - 1)^2, a >= 0;   weights = a / sum
    minimum-norm point:     P. Wolfe, Mathematical Programming 11, 1976

have d or few unknowns, where the textbook quadratic program has n. A peer is made once for the
vertices (`make(vertices)`: what it may prepare is not timed) and then answers one query at a time,
in float64, with indices and weights; `Batched` peers answer all queries in one call.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Answer = tuple[np.ndarray, np.ndarray]  # indices of vertices, weights of sum one
Solver = Callable[[np.ndarray], Answer]


class Peer(NamedTuple):
    """Someone else's solver.

    Attributes:
      name: as the table shows it.
      make: from float64 vertices `(n, d)` to a function of one query `(d,)`, or of all queries
        where `batched`, that returns indices and weights.
      needs: packages to import.
      rival: whether it counts for the ratio; the others are shown for comparison.
      batched: takes all queries at once.
      largest: entries of the vertices beyond which it is not tried.
    """

    name: str
    make: Callable[[np.ndarray], Any]
    needs: tuple[str, ...] = ()
    rival: bool = False
    batched: bool = False
    largest: float = np.inf

    def missing(self) -> str:
        """Why it cannot run here, empty if it can."""
        for package in self.needs:
            try:
                importlib.import_module(package)
            except ImportError as error:
                return str(error)
        return ""


def make_daqp(vertices: np.ndarray) -> Solver:
    import daqp

    count, dim = vertices.shape
    hessian, linear = np.eye(dim), np.zeros(dim)
    upper, lower, sense = np.full(count, 1e30), np.ones(count), np.zeros(count, np.int32)

    def solve(query: np.ndarray) -> Answer:
        solution = daqp.solve(
            hessian, linear, vertices - query, upper, lower, sense,
            primal_tol=1e-11, dual_tol=1e-11, iter_limit=100_000,
        )  # fmt: skip
        return normalised(np.maximum(-np.asarray(solution[3]["lam"]), 0))

    return solve


def make_quadprog(vertices: np.ndarray) -> Solver:
    import quadprog

    count, dim = vertices.shape
    # With factorized=True the first argument is the inverse of the Hessian's factor.
    identity, linear, ones = np.eye(dim), np.zeros(dim), np.ones(count)

    def solve(query: np.ndarray) -> Answer:
        solution = quadprog.solve_qp(identity, linear, (vertices - query).T, ones, 0, True)
        return normalised(np.maximum(solution[4], 0))

    return solve


def make_nnls(vertices: np.ndarray) -> Solver:
    import scipy.optimize

    matrix = np.ones((vertices.shape[1] + 1, len(vertices)))
    target = np.zeros(len(matrix))
    target[-1] = 1

    def solve(query: np.ndarray) -> Answer:
        matrix[:-1] = (vertices - query).T
        return normalised(scipy.optimize.nnls(matrix, target, maxiter=100_000)[0])

    return solve


def make_wolfe(vertices: np.ndarray) -> Solver:
    """Wolfe's algorithm in plain numpy, one vertex a pass.

    Queries are not subtracted from all vertices; the Gram matrix of the support, shifted to the
    query, is kept from step to step and solved by LAPACK's Cholesky.
    """
    from scipy.linalg import get_lapack_funcs

    (posv,) = get_lapack_funcs(("posv",), dtype=np.float64)
    half_squares = 0.5 * np.einsum("ij,ij->i", vertices, vertices)
    most = vertices.shape[1] + 2

    def solve(query: np.ndarray) -> Answer:
        index = [int(np.argmin(half_squares - vertices @ query))]
        rows = np.empty((most, len(query)))
        rows[0] = vertices[index[0]] - query
        gram = np.empty((most, most))
        constant = rows[0] @ rows[0] or 1.0
        gram[0, 0] = 2 * constant
        weights = np.ones(1)
        size = 1
        residual = rows[0]
        for _ in range(100 * most):
            score = vertices @ residual
            new = int(np.argmin(score))
            square = residual @ residual
            gap = square - (score[new] - query @ residual)
            if gap <= 1e-13 * square or new in index or size == most:
                break
            rows[size] = vertices[new] - query
            gram[size, : size + 1] = rows[: size + 1] @ rows[size] + constant
            gram[: size + 1, size] = gram[size, : size + 1]
            index.append(new)
            weights = np.append(weights, 0.0)
            size += 1
            while True:
                # H y = 1 with H = U U' + constant: the affine minimiser is y / sum(y).
                _, affine, failed = posv(gram[:size, :size], np.ones(size))
                if failed:
                    affine = np.linalg.lstsq(gram[:size, :size], np.ones(size))[0]
                affine = affine / affine.sum()
                if not np.isfinite(affine).all():
                    return np.array(index), weights
                if affine.min() > 0:
                    weights = affine
                    break
                shrinking = affine <= 0
                fall = weights[shrinking] - affine[shrinking]
                ratio = np.divide(weights[shrinking], fall, out=np.zeros(len(fall)), where=fall > 0)
                weights = weights + ratio.min() * (affine - weights)
                keep = weights > 1e-14
                keep[np.flatnonzero(shrinking)[ratio.argmin()]] = False
                index = [i for i, kept in zip(index, keep, strict=True) if kept]
                weights = weights[keep] / weights[keep].sum()
                kept = np.flatnonzero(keep)
                size = len(kept)
                rows[:size] = rows[kept]
                gram[:size, :size] = gram[np.ix_(kept, kept)]
            residual = weights @ rows[:size]
        return np.array(index), weights

    return solve


def make_sketching(vertices: np.ndarray) -> Solver:
    """Growing pieces of the data, after R. Yousefzadeh, arXiv:2102.10502.

    Vertices are ordered by their distance to the query and taken in pieces that double. On each
    piece a step along the projected gradient to its first minimiser (the Cauchy point) changes many
    weights at once, the exact problem is solved on those that stay positive, and the next piece
    starts from that solution.
    """
    half_squares = 0.5 * np.einsum("ij,ij->i", vertices, vertices)

    def solve(query: np.ndarray) -> Answer:
        order = np.argsort(half_squares - vertices @ query)
        index, weights = order[:1], np.ones(1)
        size = min(len(order), 2 * vertices.shape[1])
        while True:
            piece = order[:size]
            rows = vertices[piece] - query
            for _ in range(200):
                residual = weights @ (vertices[index] - query)
                score = rows @ residual
                square = residual @ residual
                if square - score.min() <= 1e-13 * square:
                    break
                full = np.zeros(size)
                full[_positions(piece, index)] = weights
                survivors = np.flatnonzero(_cauchy_point(full, rows, score) > 0)
                if len(survivors) > 4 * vertices.shape[1]:
                    survivors = survivors[np.argsort(score[survivors])[: 4 * vertices.shape[1]]]
                survivors = np.union1d(survivors, _positions(piece, index))
                chosen, found = make_wolfe(rows[survivors])(np.zeros_like(query))
                better = found @ rows[survivors][chosen]
                if better @ better >= square * (1 - 1e-15):
                    # The Cauchy step is lost in rounding: take the most violated vertex.
                    survivors = np.union1d(_positions(piece, index), [score.argmin()])
                    chosen, found = make_wolfe(rows[survivors])(np.zeros_like(query))
                    better = found @ rows[survivors][chosen]
                    if better @ better >= square:
                        break
                index, weights = piece[survivors[chosen]], found
            if size == len(order):
                return index, weights
            size = min(2 * size, len(order))

    return solve


def _positions(piece: np.ndarray, index: np.ndarray) -> np.ndarray:
    sorter = np.argsort(piece)
    return sorter[np.searchsorted(piece, index, sorter=sorter)]


def _cauchy_point(weights: np.ndarray, rows: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The best of a few points on the projected gradient path from the weights."""
    best, value = weights, np.inf
    length = 1 / max(np.abs(gradient - gradient.min()).max(), 1e-300)
    for _ in range(40):
        point = _onto_simplex(weights - length * gradient)
        residual = point @ rows
        if residual @ residual > value:
            break
        best, value = point, residual @ residual
        length /= 2
    return best


def _onto_simplex(point: np.ndarray) -> np.ndarray:
    descending = np.sort(point)[::-1]
    excess = np.cumsum(descending) - 1
    count = np.flatnonzero(descending * np.arange(1, len(point) + 1) > excess)[-1] + 1
    return np.maximum(point - excess[count - 1] / count, 0)


def make_qpsolvers(solver: str, **options: Any) -> Callable[[np.ndarray], Solver]:
    def make(vertices: np.ndarray) -> Solver:
        import qpsolvers  # pyright: ignore[reportMissingImports]
        import scipy.sparse

        count, dim = vertices.shape
        hessian: Any = scipy.sparse.eye(dim, format="csc")
        linear = np.zeros(dim)

        def solve(query: np.ndarray) -> Answer:
            matrix: Any = scipy.sparse.csc_matrix(query - vertices)
            problem = qpsolvers.Problem(hessian, linear, matrix, -np.ones(count))
            solution = qpsolvers.solve_problem(problem, solver=solver, **options)
            return normalised(np.maximum(np.asarray(solution.z), 0))

        return solve

    return make


def make_qpax(vertices: np.ndarray) -> Callable[[np.ndarray], list[Answer]]:
    """An interior-point method in JAX, in the separating-hyperplane form, under vmap."""
    import jax
    import jax.numpy as jnp
    import qpax  # pyright: ignore[reportMissingImports]

    with jax.enable_x64(True):
        stored = jnp.asarray(vertices)
        count, dim = vertices.shape

        @jax.jit
        @jax.vmap
        def multipliers(query):
            none = jnp.zeros((0, dim)), jnp.zeros(0)
            problem = jnp.eye(dim), jnp.zeros(dim), *none, query - stored, -jnp.ones(count)
            return qpax.solve_qp(*problem)[2]

    def solve(queries: np.ndarray) -> list[Answer]:
        with jax.enable_x64(True):
            found = np.asarray(multipliers(jnp.asarray(queries)))
        return [normalised(np.maximum(row, 0)) for row in found]

    return solve


def make_projected_gradient(vertices: np.ndarray) -> Callable[[np.ndarray], list[Answer]]:
    """Accelerated projected gradient on the simplex of all vertices, as jaxopt does it, in JAX."""
    import jax
    import jax.numpy as jnp
    import optax.projections

    largest = np.linalg.norm(vertices, 2) ** 2
    stored = jnp.asarray(vertices, jnp.float32)

    @jax.jit
    @jax.vmap
    def weights(query):
        def step(_, state):
            point, ahead, momentum = state
            gradient = stored @ (ahead @ stored - query)
            new = optax.projections.projection_simplex(ahead - gradient / largest)
            faster = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
            return new, new + (momentum - 1) / faster * (new - point), faster

        start = jnp.full(len(vertices), 1 / len(vertices), jnp.float32)
        return jax.lax.fori_loop(0, 500, step, (start, start, jnp.float32(1)))[0]

    def solve(queries: np.ndarray) -> list[Answer]:
        with jax.enable_x64(False):
            found = np.asarray(weights(jnp.asarray(queries, jnp.float32)), np.float64)
        return [normalised(np.maximum(row, 0)) for row in found]

    return solve


def make_polytopax(vertices: np.ndarray) -> Solver:
    """The distance of polytopax, which names no point: the vertex at that distance is returned."""
    import jax.numpy as jnp
    from polytopax import ConvexHull  # pyright: ignore[reportMissingImports]

    hull: Any = ConvexHull(jnp.asarray(vertices, jnp.float32))

    def solve(query: np.ndarray) -> Answer:
        distance = float(hull.distance_to(jnp.asarray(query, jnp.float32)))
        lengths = np.linalg.norm(vertices - query, axis=1)
        return np.array([np.abs(lengths - distance).argmin()]), np.ones(1)

    return solve


def normalised(weights: np.ndarray) -> Answer:
    """Indices and values of the positive weights, scaled to sum one."""
    index = np.flatnonzero(weights > 0)
    if not np.isfinite(weights).all() or not len(index):
        return np.zeros(1, int), np.ones(1)
    return index, weights[index] / weights[index].sum()


PEERS = (
    Peer("DAQP", make_daqp, ("daqp",), rival=True),
    Peer("Wolfe, numpy", make_wolfe, rival=True),
    Peer("quadprog", make_quadprog, ("quadprog",), rival=True),
    Peer("scipy.nnls", make_nnls, rival=True),
    Peer("sketching, arXiv:2102.10502", make_sketching),
    Peer("Clarabel", make_qpsolvers("clarabel"), ("qpsolvers", "clarabel"), largest=3e6),
    Peer(
        "OSQP",
        make_qpsolvers("osqp", eps_abs=1e-7, eps_rel=1e-7, max_iter=100_000),
        ("qpsolvers", "osqp"),
        largest=3e6,
    ),
    Peer("qpax, vmap", make_qpax, ("qpax",), batched=True, largest=3e6),
    Peer("projected gradient, 500 steps, vmap", make_projected_gradient, batched=True, largest=3e7),
    Peer("polytopax", make_polytopax, ("polytopax",)),
)
