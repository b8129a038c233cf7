"""What every public name promises, tested for all of them from one table.

A public function without a case here fails `test_every_public_function_has_a_case`: give it a small
example in `CASES`, or, if it works on the host only, its reason in `HOST_ONLY`.
"""

import inspect
import operator
import re
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hullgeo
from hullgeo import Status

ROWS = 4
Rows = Any


class Case(NamedTuple):
    """One public function on a small example.

    Attributes:
      make: from a random generator and a type to `(rows, shared)`: a pytree with a leading axis of
        `ROWS`, and whatever all rows share.
      call: from `(rows, shared)` and options to the result.
      options: sets of options among which nothing is compiled again.
      free: fields of the result that may differ between single, mapped and compiled runs.
      rtol: how far floating-point fields may differ between them, in float32 and float64.
      wide: a float64 NumPy array is answered in float64 whatever the global flag says.
      nan_status: status of a row with NaN; None where the result has no status.
    """

    make: Callable[[np.random.Generator, Any], tuple[Rows, Any]]
    call: Callable[..., Any]
    options: tuple[dict[str, Any], ...] = ({},)
    free: tuple[str, ...] = ("num_steps", "num_evaluations", "num_gradients")
    rtol: tuple[float, float] = (1e-5, 1e-12)
    wide: bool = True
    nan_status: Status | None = Status.NONFINITE


def head_of(rng: np.random.Generator, dtype: Any, dim: int = 5) -> hullgeo.LinearHead:
    kernel = rng.normal(size=(dim, 3)).astype(dtype)
    return hullgeo.LinearHead(kernel, rng.normal(size=3).astype(dtype))


def features_of(weights: Any, images: Any) -> Any:
    flat = images.reshape(*images.shape[:-3], -1)
    return jax.nn.relu(jnp.matmul(flat, weights, precision="highest"))


def network_of(rng: np.random.Generator, dtype: Any) -> hullgeo.Classifier:
    """Two layers, whose classes meet at the grey image."""
    weights = jnp.asarray(rng.normal(size=(8, 5)), dtype)
    features = jax.tree_util.Partial(features_of, weights)
    kernel = jnp.asarray(rng.normal(size=(5, 3)), dtype)
    grey = features(jnp.full((4, 2, 1), 0.5, dtype))
    return hullgeo.Classifier(features, hullgeo.LinearHead(kernel, -jnp.matmul(grey, kernel)))


def images_of(rng: np.random.Generator, dtype: Any) -> np.ndarray:
    return rng.uniform(size=(ROWS, 4, 2, 1)).astype(dtype)


def hull_inputs(rng: np.random.Generator, dtype: Any) -> tuple[Rows, Any]:
    return rng.normal(size=(ROWS, 4)).astype(dtype), rng.normal(size=(12, 4)).astype(dtype)


def crossing_inputs(rng: np.random.Generator, dtype: Any) -> tuple[Rows, Any]:
    return (images_of(rng, dtype), images_of(rng, dtype)), network_of(rng, dtype)


def inversion_inputs(rng: np.random.Generator, dtype: Any) -> tuple[Rows, Any]:
    network = network_of(rng, dtype)
    start, aim = images_of(rng, dtype), images_of(rng, dtype)
    target = np.asarray(network.features(jnp.asarray(aim)))
    return (target, start), network


def projections(rng: np.random.Generator, dtype: Any) -> tuple[Rows, Any]:
    queries, vertices = hull_inputs(rng, dtype)
    return jax.tree.map(np.asarray, hullgeo.project_to_hull(queries, vertices)), None


def class_projections(rng: np.random.Generator, dtype: Any) -> tuple[Rows, Any]:
    queries, vertices = hull_inputs(rng, dtype)
    return jax.tree.map(
        np.asarray,
        hullgeo.project_to_class_hulls(
            queries, vertices, np.arange(12) % 3, num_classes=3, variant=CHEAP
        ),
    ), None


CHEAP = "blended_pairwise"  # compiled faster than the engine
HULL_FIELDS = (
    "num_steps", "support", "weights", "gap", "point", "distance_lower_bound", "interior_radius",
)  # fmt: skip

CASES: dict[str, Case] = {
    "Classifier": Case(
        lambda rng, dtype: (images_of(rng, dtype), network_of(rng, dtype)),
        lambda images, network: network(jnp.asarray(images)),
        wide=False,
        nan_status=None,
    ),
    "LinearHead": Case(
        lambda rng, dtype: (rng.normal(size=(ROWS, 5)).astype(dtype), head_of(rng, dtype)),
        lambda features, head: head(features),
        nan_status=None,
    ),
    "ambiguous_image": Case(
        lambda rng, dtype: (images_of(rng, dtype), network_of(rng, dtype)),
        lambda images, network, **options: hullgeo.ambiguous_image(
            network, images, np.array([0, 1]), **options
        ),
        options=({"max_steps": 25}, {"max_steps": 20, "atol": 1e-2}),
        rtol=(1e-2, 1e-6),
        wide=False,
    ),
    "boundary_distance": Case(
        lambda rng, dtype: (rng.normal(size=(ROWS, 5)).astype(dtype), head_of(rng, dtype)),
        lambda features, head: hullgeo.boundary_distance(features, head),
    ),
    "failed": Case(
        lambda rng, dtype: (
            hullgeo.BoundaryDistance(
                rng.normal(size=ROWS).astype(dtype), *np.arange(3 * ROWS).reshape(3, -1)
            ),
            None,
        ),
        lambda result, _: hullgeo.failed(result),
        nan_status=None,
    ),
    "find_crossing": Case(
        crossing_inputs,
        lambda ends, network, **options: hullgeo.find_crossing(network, *ends, **options),
        options=({}, {"xtol": 1e-3}, {"xtol": 1e-4, "max_evaluations": 20}),
        rtol=(1e-3, 1e-5),
        wide=False,
    ),
    "half_squared_distance": Case(
        hull_inputs,
        lambda queries, vertices, **options: hullgeo.half_squared_distance(
            queries, vertices, variant=CHEAP, **options
        ),
        options=({}, {"rtol": 1e-4}, {"atol": 1e-5, "max_steps": 100}),
        rtol=(2e-6, 1e-6),
        nan_status=None,
    ),
    "hull_distance": Case(
        hull_inputs,
        lambda queries, vertices, **options: hullgeo.hull_distance(
            queries, vertices, variant=CHEAP, **options
        ),
        options=({}, {"rtol": 1e-4}, {"atol": 1e-5, "max_steps": 100}),
        rtol=(2e-6, 1e-6),
        nan_status=None,
    ),
    "invert_features": Case(
        inversion_inputs,
        lambda rows, network, **options: hullgeo.invert_features(
            network.features, *rows, **options
        ),
        options=({"max_steps": 20}, {"max_steps": 10, "rtol": 1e-2}),
        rtol=(5e-3, 1e-8),  # the residual that was asked for may be undercut in different steps
        wide=False,
    ),
    "membership": Case(
        projections,
        lambda projection, _, **options: hullgeo.membership(projection, **options),
        options=({}, {"atol": 0.1}, {"atol": 2.0}),
        nan_status=None,
    ),
    "morph": Case(
        crossing_inputs,
        lambda ends, network, **options: hullgeo.morph(network, *ends, num_frames=3, **options),
        options=({"max_steps": 6}, {"max_steps": 5, "rtol": 1e-1}),
        free=("num_gradients", "crossings"),
        rtol=(1e-2, 1e-6),
        wide=False,
    ),
    "nearest_boundary_point": Case(
        lambda rng, dtype: (rng.normal(size=(ROWS, 5)).astype(dtype), head_of(rng, dtype)),
        lambda features, head, **options: hullgeo.nearest_boundary_point(
            features, head, lower=0.0, **options
        ),
        options=({}, {"rtol": 1e-4}, {"rival": 1}),
        rtol=(1e-5, 1e-9),
    ),
    "nearest_hull": Case(
        class_projections,
        lambda projection, _: hullgeo.nearest_hull(projection),
        free=("rival",),
    ),
    "nearest_flip": Case(
        lambda rng, dtype: (images_of(rng, dtype), network_of(rng, dtype)),
        lambda images, network, **options: hullgeo.nearest_flip(network, images, **options),
        options=({"budget": 40}, {"budget": 50}),
        free=("tie_gap", "kkt_residual", "num_gradients"),
        rtol=(1e-3, 1e-6),
        wide=False,
    ),
    "tie_point": Case(
        lambda rng, dtype: (rng.normal(size=(ROWS, 5)).astype(dtype), head_of(rng, dtype)),
        lambda features, head, **options: hullgeo.tie_point(
            features, head, [0, 2], lower=0.0, **options
        ),
        options=({}, {"rtol": 1e-4}),
        free=("multipliers", "kkt_residual"),
        rtol=(1e-5, 1e-8),
    ),
    "project_to_hull": Case(
        hull_inputs,
        lambda queries, vertices, **options: hullgeo.project_to_hull(queries, vertices, **options),
        options=({}, {"rtol": 1e-4}, {"atol": 1e-5, "max_steps": 100}),
        free=HULL_FIELDS,
        rtol=(2e-6, 1e-6),
    ),
    "project_to_class_hulls": Case(
        hull_inputs,
        lambda queries, vertices, **options: hullgeo.project_to_class_hulls(
            queries, vertices, np.arange(12) % 3, num_classes=3, variant=CHEAP, **options
        ),
        options=({}, {"rtol": 1e-4}, {"atol": 1e-5, "max_steps": 100}),
        free=HULL_FIELDS,
        rtol=(2e-6, 1e-6),
    ),
    "segment_classes": Case(
        lambda rng, dtype: (
            tuple(4 * rng.normal(size=(2, ROWS, 5)).astype(dtype)),
            head_of(rng, dtype),
        ),
        lambda ends, head: hullgeo.segment_classes(*ends, head),
    ),
    "total_variation": Case(
        lambda rng, dtype: (images_of(rng, dtype), None),
        lambda images, _: hullgeo.total_variation(jnp.asarray(images)),
        wide=False,
        nan_status=None,
    ),
}

HOST_ONLY = {
    "analyze": "writes files",
    "extreme_points": "rounds of projections on the host",
    "extract_features": "streams batches to NumPy",
    "from_arrays": "checks the numbers of a head",
    "from_callables": "runs the model once",
    "from_linen": "runs the model once",
    "from_nnx": "runs the model once",
    "load_stage": "reads a file",
    "partition": "linear programs on the host",
    "prepare_hull": "one set of vertices, no rows; in tests/test_oracle.py",
    "plane_cells": "as many polygons as there are",
    "plane_classes": "refines on the host",
    "raise_if_failed": "raises",
    "segment_path": "a proof: rows without a fixed number",
    "smoothed_start": "a loop over networks",
    "trace_segment": "as many crossings as there are",
    "tie_map": "rows are sets of classes, not queries",
    "hull_diameter": "one set of points, in blocks on the host",
    "hull_guarantee": "one row a class, not a query",
    "hull_to_hull": "two sets of points, no rows",
    "region_membership": "class by class on the host",
}

# Nothing to derive, hence no source to name.
PLAIN = {"failed", "load_stage", "raise_if_failed"}

# Data, not options: these may be positional although they have a default.
OPTIONAL_DATA = {("from_arrays", "bias")}


def public_names() -> dict[str, Any]:
    names = {name: getattr(hullgeo, name) for name in dir(hullgeo) if not name.startswith("_")}
    return {name: value for name, value in names.items() if not inspect.ismodule(value)}


def is_result(value: Any) -> bool:
    return isinstance(value, type) and hasattr(value, "_fields")


FUNCTIONS = sorted(name for name, value in public_names().items() if inspect.isfunction(value))
CLASSES = sorted(name for name, value in public_names().items() if inspect.isclass(value))
each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_class = pytest.mark.parametrize("name", CLASSES)
# Searches through a network take long to compile: most of what is asked of them runs as slow.
SEARCHES = {"ambiguous_image", "invert_features", "morph", "nearest_flip"}
each_case = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SEARCHES else ())
        for name in sorted(CASES)
    ],
)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])


def example(name: str, dtype: Any, seed: int = 0) -> tuple[Rows, Any]:
    return CASES[name].make(np.random.default_rng(seed), np.dtype(dtype))


@lru_cache
def plain(name: str, dtype: Any) -> dict[str, np.ndarray]:
    """The fields of an ordinary call on the example."""
    return fields(CASES[name].call(*example(name, dtype)))


def fields(result: Any) -> dict[str, np.ndarray]:
    """Named arrays of a result, whatever its kind."""
    if hasattr(result, "_asdict"):
        result = result._asdict()
    if not isinstance(result, dict):
        result = {"value": result}
    leaves = {}
    for name, value in result.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            leaves[name + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return leaves


def assert_same(name: str, got: Any, expected: Any, rows: slice = slice(None)) -> None:
    case = CASES[name]
    got, expected = fields(got), fields(expected)
    assert got.keys() == expected.keys()
    for field in got.keys() - set(case.free):
        one, other = got[field], expected[field]
        assert one.shape == other.shape, field
        assert one.dtype == other.dtype, field
        rtol = case.rtol[int(one.dtype == np.float64)]
        if one.dtype.kind == "f":
            np.testing.assert_allclose(
                one[rows], other[rows], rtol=rtol, atol=rtol, err_msg=f"{name}.{field}"
            )
        else:
            np.testing.assert_array_equal(one[rows], other[rows], err_msg=f"{name}.{field}")


@contextmanager
def compilations():
    """The list of programs compiled inside the block."""
    compiled = []

    def listen(event: str, duration: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details or event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_counter_counts():
    @jax.jit
    def double(value):
        return 2 * value

    values = np.ones(3), np.zeros(3), np.ones(4)
    with compilations() as compiled:
        double(values[0])
        assert len(compiled) == 1
        double(values[1])
        assert len(compiled) == 1
        double(values[2])
        assert len(compiled) == 2


def test_every_public_function_has_a_case():
    missing = set(FUNCTIONS) - set(CASES) - set(HOST_ONLY)
    assert not missing, f"add an example for {sorted(missing)} to CASES"
    assert not set(CASES) & set(HOST_ONLY)


def test_cases_are_of_public_names():
    assert set(CASES) <= set(public_names())


@each_function
def test_function_is_documented(name):
    function = getattr(hullgeo, name)
    text, module = inspect.getdoc(function), inspect.getmodule(function)
    assert re.match(r"[A-Z][^\n]*\.(\n\n|$)", text), "start with one sentence on one line"
    parameters = list(inspect.signature(function).parameters)
    if parameters:
        assert "\nArgs:\n" in text
    described = re.findall(r"^  \*{0,2}(\w+(?:, \w+)*):", text, flags=re.MULTILINE)
    described = {word for words in described for word in words.split(", ")}
    assert set(parameters) <= described, f"undocumented: {set(parameters) - described}"
    returned = inspect.signature(function).return_annotation
    assert returned is not inspect.Signature.empty
    assert "Return" in text, "say what is returned"
    if len(parameters) > 1:
        assert "\nRaises:\n" in text, "say what is refused"
    if name not in PLAIN:
        sources = text + module.__doc__
        assert re.search(r"arXiv|Source:|\b(19|20)\d\d\b", sources), "name the source"
    if name in CASES and CASES[name].nan_status is not None:
        results = [kind for kind in CLASSES if kind in str(returned)]
        texts = [text, *(getattr(hullgeo, kind).__doc__ for kind in results)]
        assert any("guarantee" in words.lower() for words in texts), "state the guarantee"


@each_function
def test_shapes_are_stated(name):
    function = getattr(hullgeo, name)
    text = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters.values():
        annotation = str(parameter.annotation)
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
        if parameter.name in {"queries", "vertices", "features", "start", "end", "images"}:
            assert "(" in text or "Float" in annotation, f"no shape for {parameter.name}"


@each_function
def test_options_are_keyword_only(name):
    for parameter in inspect.signature(getattr(hullgeo, name)).parameters.values():
        optional = parameter.default is not inspect.Parameter.empty
        if optional and (name, parameter.name) not in OPTIONAL_DATA:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter.name
        assert parameter.name not in {"jit", "verbose"}


@each_class
def test_class_is_documented(name):
    kind = getattr(hullgeo, name)
    text = inspect.getdoc(kind)
    assert text
    if not is_result(kind):
        return
    described = re.findall(r"^  (\w+(?:, \w+)*):", text, flags=re.MULTILINE)
    described = {word for words in described for word in words.split(", ")}
    assert set(kind._fields) <= described, f"undocumented: {set(kind._fields) - described}"
    assert set(kind.__annotations__) == set(kind._fields)
    for member, value in vars(kind).items():
        if isinstance(value, property) and not member.startswith("_"):
            assert value.__doc__, member


@pytest.mark.parametrize("name", sorted(CASES))
@each_dtype
def test_dtype_and_pytree(name, dtype):
    rows, shared = example(name, dtype)
    result = CASES[name].call(rows, shared)
    for field, leaf in fields(result).items():
        assert leaf.dtype in (dtype, np.int32, np.bool_), field
        if field != "support":
            assert leaf.shape[:1] == (ROWS,), field
    leaves, structure = jax.tree.flatten(result)
    assert all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
    assert type(jax.tree.unflatten(structure, leaves)) is type(result)
    again = jax.jit(lambda value: value)(result)
    assert type(again) is type(result) or not hasattr(result, "_fields")


@each_case
def test_jit_equals_no_jit(name):
    rows, shared = example(name, np.float64)
    case = CASES[name]
    options = case.options[-1]
    traced = jax.jit(case.call)(rows, shared, **options)  # options are traced, too
    assert_same(name, traced, case.call(rows, shared, **options))


@each_case
def test_vmap_equals_loop_and_batch(name):
    rows, shared = example(name, np.float32)
    call = CASES[name].call
    singles = [jax.tree.map(operator.itemgetter(i), rows) for i in range(ROWS)]
    loop = [call(single, shared) for single in singles]
    loop = jax.tree.map(lambda *leaves: np.stack(leaves), *loop)
    assert_same(name, plain(name, np.float32), loop)
    mapped = jax.jit(jax.vmap(call, in_axes=(0, None)))(rows, shared)
    assert_same(name, mapped, loop)


@each_case
def test_more_batch_axes(name):
    rows, shared = example(name, np.float64)
    square = jax.tree.map(lambda leaf: leaf.reshape(2, ROWS // 2, *leaf.shape[1:]), rows)
    result = CASES[name].call(square, shared)
    flat = jax.tree.map(lambda leaf: np.reshape(leaf, (ROWS, *leaf.shape[2:])), result)
    assert_same(name, flat, plain(name, np.float64))


@each_case
def test_float32_with_float64_switched_off(name):
    rows, shared = example(name, np.float32)
    expected = plain(name, np.float32)
    with jax.enable_x64(False):
        assert_same(name, CASES[name].call(rows, shared), expected)
        assert_same(name, jax.jit(CASES[name].call)(rows, shared), expected)


@pytest.mark.parametrize("name", [name for name in sorted(CASES) if CASES[name].wide])
def test_float64_arrays_are_not_silently_rounded(name):
    rows, shared = example(name, np.float64)
    expected = plain(name, np.float64)
    with jax.enable_x64(False):
        assert_same(name, CASES[name].call(rows, shared), expected)


@each_case
@each_dtype
def test_repeated_calls_compile_nothing(name, dtype):
    case = CASES[name]
    rows, shared = example(name, dtype)
    others, _ = example(name, dtype, seed=1)
    for known in rows, others:  # parts of a program may be compiled where they are first needed
        case.call(known, shared, **case.options[0])
    mixed = jax.tree.map(lambda one, other: np.concatenate([one[1::2], other[::2]]), rows, others)
    with compilations() as compiled:
        for options in case.options:
            case.call(mixed, shared, **options)
    assert not compiled, f"{len(compiled)} programs compiled again"


@each_case
@each_dtype
def test_nan_in_one_row_leaves_the_others(name, dtype):
    rows, shared = example(name, dtype)

    def spoil(leaf):
        leaf = np.array(leaf)
        if leaf.dtype.kind == "f":
            leaf[(1, *[0] * (leaf.ndim - 1))] = np.nan
        return leaf

    expected = plain(name, dtype)
    result = CASES[name].call(jax.tree.map(spoil, rows), shared)
    for others in [slice(0, 1), slice(2, None)]:
        assert_same(name, result, expected, others)
    if CASES[name].nan_status is not None:
        assert np.all(result.status[1] == CASES[name].nan_status)
