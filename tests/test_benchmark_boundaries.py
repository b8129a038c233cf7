"""The boundary benchmark on a tiny problem: the referee is honest, the peers agree with us."""

import json
import sys

import numpy as np
import pytest

from benchmarks import boundaries


def test_the_referee_sees_a_miss_and_a_detour():
    given = boundaries.problem(4)
    _, normals, offsets, planes = boundaries.conditions(given, 0)
    rival = int(planes.argmin())
    point = given.features[0] + planes[rival] * normals[rival]  # on the plane, outside the box
    distance, miss = boundaries.judge(given, 0, point, [rival])
    assert distance <= planes[rival] + 1e-12  # clipped
    beyond = boundaries.by_daqp(given.features[0], normals[rival], offsets[rival], given)
    assert beyond is not None
    exact, tied = boundaries.judge(given, 0, beyond, [rival])
    assert exact >= planes[rival] - 1e-12
    assert tied < 1e-9
    assert miss >= tied
    assert boundaries.judge(given, 0, given.features[0], [rival])[1] > 1e-3
    assert boundaries.judge(given, 0, np.full(boundaries.DIM, np.nan), [rival]) == (np.inf, np.inf)


@pytest.mark.parametrize("name", boundaries.SOLVERS)
def test_peers_find_the_same_distance(name):
    given = boundaries.problem(2)
    (reference, rival), *_ = boundaries.nearest_in_loop("daqp", given, range(1))
    (point, at), *_ = boundaries.nearest_in_loop(name, given, range(1))
    assert at == rival
    np.testing.assert_allclose(point, reference, atol=1e-5)


@pytest.mark.slow
def test_the_whole_run_fills_a_table(tmp_path, capsys, monkeypatch):
    out = tmp_path / "boundaries.json"
    options = ["--queries", "6", "--ties", "4", "--counts", "3", "3", "2", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["boundaries", *options])
    boundaries.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["solver"] for row in rows] == ["hullgeo", *boundaries.SOLVERS, "hullgeo", "daqp"]
    for row in rows:
        assert row["worst_miss"] < 1e-6
        assert -1e-6 < row["least_excess"] <= row["worst_excess"] < 1e-5
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 1
