"""The hull benchmarks on tiny problems: honest referees, peers that agree, filled tables."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import hard_problems, honesty, hull, peers, problems
from hullgeo import certificate, enclosure, oracle, project_to_hull


@pytest.fixture
def tiny(monkeypatch):
    rng = np.random.default_rng(0)
    vertices = rng.normal(size=(40, 5)).astype(np.float32)
    queries = (3 * rng.normal(size=(6, 5))).astype(np.float32)

    def load(name, num_queries=256):
        return problems.Problem(name, vertices, queries[:num_queries])

    monkeypatch.setattr(problems, "load", load)
    return load("a")


def test_the_referee_knows_a_triangle():
    vertices = np.array([[0.0, 0], [2, 0], [0, 2]])
    query = np.array([2.0, 2.0])

    def judge(index, weights):
        (ruling,) = hull.judge(vertices, query[None], [(np.array(index), np.array(weights))])
        return ruling

    optimal = judge([1, 2], [0.5, 0.5])
    assert optimal.upper == pytest.approx(2**0.5)
    assert optimal.lower == pytest.approx(2**0.5)
    assert optimal.gap == pytest.approx(0, abs=1e-15)
    assert optimal.support == 2
    corner = judge([1], [1.0])
    assert corner.upper == pytest.approx(2)
    assert corner.lower == 0
    assert corner.gap == pytest.approx(1)
    assert judge([1], [np.nan]).upper == np.inf
    assert judge([1, 0], [2.0, -1]).upper == np.inf


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_peers_find_the_nearest_point(peer, tiny):
    if reason := peer.missing():
        pytest.skip(reason)
    exact = peer.rival or "sketching" in peer.name
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found, answers = hull.measure_peer(peer, tiny, 10.0, lambda: 0.25)
    assert "skipped" not in found, found
    assert found["ours_ms"] == 250
    rulings = hull.judge(tiny.vertices, tiny.queries, answers)
    assert len(rulings) == (4 if peer.batched else 6)
    if peer.name != "polytopax":
        assert max(ruling.gap for ruling in rulings) < (1e-12 if exact else 1e-2)


def test_a_missing_package_is_a_reason_not_an_error(tiny):
    peer = peers.Peer("nobody", peers.make_wolfe, needs=("no_such_package",))
    found, answers = hull.measure_peer(peer, tiny, 1.0, lambda: 0.25)
    assert "no_such_package" in found["skipped"]
    assert not answers
    assert "skipped" in hull.describe_peer(found)


@pytest.mark.usefixtures("tiny")
def test_the_whole_run_fills_a_table(tmp_path, capsys):
    out = tmp_path / "folder" / "hull.json"
    command = "--problems a --queries 4 --variant pairwise --repeats 2 --peer-seconds 0.1 --no-wall"
    hull.main([*command.split(), "--peers", "DAQP", "Wolfe", "--out", str(out)])
    stored = json.loads(out.read_text())
    (row,) = stored["rows"]
    assert row["certified"] == 1
    assert row["false_brackets"] == 0
    assert row["ratio"] == row["best_peer_ms"] / row["ms"]
    assert row["gap_max"] < 1e-5
    assert {peer["name"] for peer in row["peers"]} == {"DAQP", "Wolfe, numpy"}
    assert stored["versions"]["jax"] in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_a_false_bracket_is_counted(monkeypatch):
    options = hull.parse(["--problems", "a", "--no-wall", "--peers", "Wolfe"])

    def boast(problem, options):
        """Right answers but for one lower bound, without compiling anything."""
        solve = peers.make_wolfe(problem.vertices.astype(np.float64))
        support, weights = np.zeros((6, 7), int), np.zeros((6, 7))
        distance = np.zeros(6)
        for row, query in enumerate(problem.queries):
            index, shares = solve(query.astype(np.float64))
            support[row, : len(index)], weights[row, : len(index)] = index, shares
            (ruling,) = hull.judge(problem.vertices, query[None], [(index, shares)])
            distance[row] = ruling.upper
        lower = distance.copy()
        lower[2] *= 1.001
        answer = SimpleNamespace(
            support=support, weights=weights, distance=distance, distance_lower_bound=lower
        )
        return {"ms": 1.0, "answer": answer, "again": lambda: 0.001}

    monkeypatch.setattr(hull, "measure_ours", boast)
    assert hull.run_problem("a", options)["false_brackets"] == 1


def test_problems_are_centred_and_scaled():
    problem = problems.load("a", 3)
    assert problem.vertices.dtype == problem.queries.dtype == np.float32
    assert problem.queries.shape == (3, 64)
    np.testing.assert_allclose(problem.vertices.mean(0), 0, atol=1e-7)
    assert np.linalg.norm(problem.vertices, axis=1).max() == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="name='z'"):
        problems.load("z")


HONEST = ["--problems", "8", "--batch", "8", "--variant", "pairwise"]


def classic_answer(batch):
    answer = project_to_hull(
        batch.queries, batch.vertices, variant="pairwise", rtol=1e-9, max_steps=200
    )
    return jax.device_get(answer)


def test_hard_problems_are_the_same_every_time():
    for kind in hard_problems.KINDS:
        for seed in (0, 5, 11):
            one, other = (hard_problems.make(kind, seed, 3) for _ in range(2))
            np.testing.assert_array_equal(one.vertices, other.vertices)
            np.testing.assert_array_equal(one.queries, other.queries)
            assert np.isfinite(one.vertices.astype(float)).all()
            assert np.isfinite(one.queries.astype(float)).all()
            if one.weights is not None:
                mean = one.weights @ one.vertices.astype(float)
                np.testing.assert_array_equal(mean, one.queries.astype(float))


def test_the_exact_referee_finds_what_is_false():
    batch = hard_problems.make("general", 0, 8)
    answer = classic_answer(batch)
    assert all(not ruling.false for ruling in honesty.judge(batch, answer))
    truth = np.array([ruling.upper for ruling in honesty.judge(batch, answer)])
    assert truth.min() > 0
    raised = answer._replace(distance_lower_bound=truth * (1 + 1e-15))
    assert all("lower bound" in ruling.false for ruling in honesty.judge(batch, raised))
    shrunk = answer._replace(distance=truth * (1 - 1e-15))
    assert all("distance" in ruling.false for ruling in honesty.judge(batch, shrunk))
    blind = answer._replace(distance=0 * truth, distance_lower_bound=0 * truth)
    inside = blind._replace(interior_radius=0 * truth + 1e-9)
    assert all("interior radius" in ruling.false for ruling in honesty.judge(batch, inside))
    unknown = answer._replace(distance=truth * np.nan)
    assert all(ruling.false for ruling in honesty.judge(batch, unknown))


def test_a_query_in_the_hull_is_never_proved_outside():
    batch = hard_problems.make("on a face", 0, 8)
    answer = classic_answer(batch)
    assert all(not ruling.false for ruling in honesty.judge(batch, answer))
    boast = answer._replace(distance_lower_bound=np.full(8, 1e-300))
    assert all("outside" in ruling.false for ruling in honesty.judge(batch, boast))


def test_an_interior_ball_may_not_stick_out():
    batch = hard_problems.make("inside", 0, 8)  # three dimensions: all facets are known
    answer = classic_answer(batch)
    zero = np.zeros(8)
    claim = answer._replace(distance=zero, distance_lower_bound=zero)
    small = honesty.judge(batch, claim._replace(interior_radius=zero + 1e-6))
    assert not any(ruling.false for ruling in small)
    large = honesty.judge(batch, claim._replace(interior_radius=zero + 10.0))
    assert all(ruling.false == ("interior radius",) for ruling in large)


def test_an_honest_run_finds_nothing_false(tmp_path, capsys):
    out = tmp_path / "honesty.json"
    assert honesty.main([*HONEST, "--kinds", "general", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["problems"] == 8
    assert found["kinds"]["general"]["false"] == {}
    assert found["kinds"]["general"]["certified_1e-6"] == 1
    assert "| general | 8 | none |" in capsys.readouterr().out


def test_every_shape_goes_every_way():
    shapes = len(hard_problems.SHAPES)
    for shape in range(shapes):
        ways = [honesty.ways_of(seed) for seed in range(shape, 20, shapes)]
        assert all(set(way) == {False, True} for way in zip(*ways, strict=True))


def test_large_hulls_ways_are_forced_upon_a_small_one():
    ways = honesty.Ways(bfloat16=True, components=True, long_rows=True, many=True)
    vertices = np.random.default_rng(0).normal(size=(300, 24)).astype(np.float32)
    with honesty.forced(ways):
        hull = honesty.prepared(vertices, ways)
        assert hull.num_nearby > 0
    assert hull.num_nearby == 0
    assert hull.components.shape == (24, 12)
    assert hull.coarse.dtype == jnp.bfloat16
    assert hull.sampled.shape == (-(-300 // oracle.SHARE),)
    assert hull.left_out.shape[0] == 0


def test_parts_share_the_seeds(monkeypatch):
    seen, make = [], hard_problems.make

    def recorded(kind, seed, batch):
        seen.append(seed)
        return make(kind, seed, batch)

    monkeypatch.setattr(hard_problems, "make", recorded)
    arguments = [*HONEST, "--problems", "16", "--kinds", "general"]
    assert honesty.main([*arguments, "--part", "1/2"]) == 0
    assert honesty.main([*arguments, "--part", "2/2"]) == 0
    assert seen == [0, 1]
    with pytest.raises(SystemExit, match=r"1/3 of 2 seeds is none"):
        honesty.main([*arguments, "--part", "1/3"])
    with pytest.raises(SystemExit):
        honesty.parse(["--part", "0/2"])


def test_a_mutated_run_must_find_something_false(monkeypatch):
    # take_bounds_away changes these for good; monkeypatch puts them back.
    monkeypatch.setattr(certificate, "_gamma", certificate._gamma)
    monkeypatch.setattr(enclosure, "U64", enclosure.U64)
    monkeypatch.setattr(oracle, "_U32", oracle._U32)
    assert honesty.main([*HONEST, "--kinds", "general", "--mutate"]) == 0
    jax.clear_caches()
