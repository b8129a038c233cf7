"""The hull benchmark on tiny problems: an honest referee, peers that agree, a filled table."""

import json

import jax
import numpy as np
import pytest

from benchmarks import hull, peers, problems


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
    optimal = hull.judge(vertices, query, (np.array([1, 2]), np.array([0.5, 0.5])))
    assert optimal.upper == pytest.approx(2**0.5)
    assert optimal.lower == pytest.approx(2**0.5)
    assert optimal.gap == pytest.approx(0, abs=1e-15)
    assert optimal.support == 2
    corner = hull.judge(vertices, query, (np.array([1]), np.ones(1)))
    assert corner.upper == pytest.approx(2)
    assert corner.lower == 0
    assert corner.gap == pytest.approx(1)
    assert hull.judge(vertices, query, (np.array([1]), np.array([np.nan]))).upper == np.inf
    assert hull.judge(vertices, query, (np.array([1, 0]), np.array([2.0, -1]))).upper == np.inf


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_peers_find_the_nearest_point(peer, tiny):
    if reason := peer.missing():
        pytest.skip(reason)
    exact = peer.rival or "sketching" in peer.name
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found, answers = hull.measure_peer(peer, tiny, seconds=10.0)
    assert "skipped" not in found, found
    rulings = [hull.judge(tiny.vertices, q, a) for q, a in zip(tiny.queries, answers, strict=False)]
    assert len(rulings) == (4 if peer.batched else 6)
    if peer.name != "polytopax":
        assert max(ruling.gap for ruling in rulings) < (1e-12 if exact else 1e-2)


def test_a_missing_package_is_a_reason_not_an_error(tiny):
    peer = peers.Peer("nobody", peers.make_wolfe, needs=("no_such_package",))
    found, answers = hull.measure_peer(peer, tiny, seconds=1.0)
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
    assert row["ratio"] == row["best_peer_ms"] / row["cpu_ms"]
    assert row["gap_max"] < 1e-5
    assert {peer["name"] for peer in row["peers"]} == {"DAQP", "Wolfe, numpy"}
    assert stored["versions"]["jax"] in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_a_false_bracket_is_counted(monkeypatch):
    command = "--problems a --variant pairwise --repeats 1 --no-wall --peers Wolfe"
    options = hull.parse(command.split())
    honest = hull.measure_ours

    def boast(problem, options):
        found = honest(problem, options)
        answer = found["answer"]
        raised = answer.distance_lower_bound.copy()
        raised[2] = 1.001 * answer.distance[2]
        return found | {"answer": answer._replace(distance_lower_bound=raised)}

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
