"""The whole analysis on a small network: right numbers, nothing stale, nothing lost."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import hullgeo
import hullgeo.plots
import hullgeo.stages
from hullgeo import Membership, Status
from hullgeo.stages import STAGES
from hullgeo.staging import Inputs, Stage

# Searches in pixels take longest to compile and have their own tests; the slow test runs them too.
SEARCHES = ("flips", "morphs", "ties", "nearest", "tie_map", "regions")  # have tests of their own
WITHOUT_FLIPS = [stage for stage in STAGES if stage.name not in SEARCHES]
NAMES = [stage.name for stage in WITHOUT_FLIPS]


def small_features(weights, images):
    flat = images.reshape(*images.shape[:-3], -1)
    return jax.nn.relu(jnp.matmul(flat, weights, precision="highest"))


def doubled_features(weights, images):
    return 2 * small_features(weights, images)


def small_network(function=small_features):
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    head = hullgeo.LinearHead(
        rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    )
    return hullgeo.Classifier(jax.tree_util.Partial(function, weights), head)


def small_images(seed, size):
    rng = np.random.default_rng(seed)
    images = rng.uniform(size=(size, 4, 4, 1)).astype(np.float32)
    predicted = np.asarray(small_network()(jnp.asarray(images))).argmax(axis=1)
    noise = rng.uniform(size=size) < 0.2
    return images, np.where(noise, (predicted + 1) % 3, predicted)


TRAIN, TEST = small_images(1, 60), small_images(2, 24)
OPTIONS = {"num_shown": 3, "num_inversions": 2, "inversion_steps": 5, "progress": False}


def classic(queries, vertices, *, verdict_only=False, **options):
    return hullgeo.project_to_hull(queries, vertices, variant="blended_pairwise", **options)


def run(out, *, network=None, train=TRAIN, test=TEST, **options):
    """Analyse with a classic variant, which compiles in a fraction of the engine's time."""
    with mock.patch.multiple(
        hullgeo.stages, _GRID=9, prepare_hull=lambda vertices: vertices, project_to_hull=classic
    ):
        options = {"stages": WITHOUT_FLIPS} | options
        return whole(out, network=network, train=train, test=test, **options)


def whole(out, *, network=None, train=TRAIN, test=TEST, **options):
    return hullgeo.analyze(network or small_network(), train, test, out=out, **OPTIONS | options)


def everything(out):
    stages = hullgeo.load_stage(out, "about")["stages"]
    return {name: hullgeo.load_stage(out, name) for name in stages}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for stage in one:
        assert one[stage].keys() == other[stage].keys()
        for name in one[stage]:
            np.testing.assert_array_equal(one[stage][name], other[stage][name])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("analysis"))


@pytest.fixture
def again(finished, tmp_path, monkeypatch):
    """A copy of the finished analysis; its report comes without figures, which take longest."""
    monkeypatch.setattr(hullgeo.plots, "render", lambda draw: {"light": "", "dark": ""})
    copied = tmp_path / "out"
    subprocess.run(["cp", "-r", str(finished.out), str(copied)], check=True)
    return copied


def test_features_and_accuracy(finished):
    features, accuracy = finished.load("features"), finished.load("accuracy")
    classifier = small_network()
    for name, (images, labels) in (("train", TRAIN), ("test", TEST)):
        expected = np.maximum(
            images.reshape(len(images), 16) @ np.asarray(classifier.features.args[0]), 0
        )
        np.testing.assert_allclose(features[name], expected, rtol=1e-5, atol=1e-6)
        logits = expected @ classifier.head.kernel + classifier.head.bias
        assert accuracy[f"{name}_accuracy"] == np.mean(logits.argmax(axis=1) == labels)
    confusion = accuracy["confusion"]
    assert confusion.sum() == len(TEST[1])
    np.testing.assert_array_equal(confusion.sum(axis=1), np.bincount(TEST[1], minlength=3))
    assert np.trace(confusion) == accuracy["test_correct"]


def nearest_in_hull(query, vertices):
    """Distance by SciPy's nonnegative least squares, weights drawn to the sum 1."""
    weight = 1e6
    rows = np.vstack([vertices.T, weight * np.ones(len(vertices))])
    weights, _ = scipy.optimize.nnls(rows, np.append(query, weight))
    return np.linalg.norm(vertices.T @ weights / weights.sum() - query)


def test_hull_distances_are_scipys(finished):
    features, hull = finished.load("features"), finished.load("hull")
    each = finished.load("class_hulls")
    train = features["train"].astype(np.float64)
    for row, query in enumerate(features["test"].astype(np.float64)):
        expected = nearest_in_hull(query, train)
        assert hull["lower"][row] <= expected + 1e-5
        assert hull["distance"][row] >= expected - 1e-5
        if expected > 1e-4:
            assert hull["verdict"][row] == Membership.OUTSIDE
            assert hull["distance"][row] <= expected * (1 + 1e-4) + 1e-5
        else:
            assert hull["verdict"][row] != Membership.OUTSIDE
        for label in range(3):
            expected = nearest_in_hull(query, train[TRAIN[1] == label])
            assert each["lower"][row, label] <= expected + 1e-5
            assert each["distance"][row, label] >= expected - 1e-5
    assert (hull["verdict"] == Membership.OUTSIDE).any()
    assert (hull["verdict"] != Membership.OUTSIDE).any()
    np.testing.assert_allclose(hull["weights"].sum(axis=1).max(), 1, atol=1e-5)


def test_boundaries_are_the_nearest_planes(finished):
    found, test = finished.load("boundary"), finished.load("features")["test"].astype(np.float64)
    kernel, bias = (np.asarray(part, np.float64) for part in small_network().head)
    for row, point in enumerate(test):
        logits = point @ kernel + bias
        label = logits.argmax()
        distances = [
            (logits[label] - logits[other]) / np.linalg.norm(kernel[:, label] - kernel[:, other])
            for other in range(3)
            if other != label
        ]
        assert found["test_distance"][row] == pytest.approx(min(distances), rel=1e-6)
        assert found["test_label"][row] == label


def test_gallery_orders(finished):
    gallery, hull, near = (finished.load(name) for name in ("gallery", "hull", "boundary"))
    assert (np.diff(near["test_distance"][gallery["ambiguous"]]) >= 0).all()
    assert near["test_distance"].argmin() == gallery["ambiguous"][0]
    assert hull["lower"].argmax() == gallery["extrapolated"][0]
    wrong = finished.load("accuracy")["test_predicted"] != TEST[1]
    assert wrong[gallery["wrong"]].all()
    np.testing.assert_array_equal(gallery["ambiguous_images"], TEST[0][gallery["ambiguous"]])
    parents = TRAIN[0][hull["support"][gallery["extrapolated"]]]
    np.testing.assert_array_equal(gallery["parent_images"], parents)


def test_inversion_targets_lie_on_the_boundary(finished):
    found = finished.load("inversion")
    logits = small_network().head(found["target"].astype(np.float64))
    rows = np.arange(len(logits))
    gap = logits[rows, found["label"]] - logits[rows, found["rival"]]
    np.testing.assert_allclose(gap, 0, atol=1e-4)
    assert (found["after"] >= 0).all()
    assert (found["after"] <= 1).all()
    features = np.asarray(small_network().features(jnp.asarray(found["after"])))
    residual = np.linalg.norm(features - found["target"], axis=1)
    np.testing.assert_allclose(
        residual / np.linalg.norm(found["target"], axis=1), found["residual"], rtol=1e-3
    )


def test_plane_holds_its_three_images(finished):
    plane, points = finished.load("plane"), finished.load("features")["test"].astype(np.float64)
    lifted = plane["origin"] + plane["corners"] @ plane["axes"]
    np.testing.assert_allclose(lifted, points[plane["anchors"]], atol=1e-10)
    lifted = plane["origin"] + plane["near_coordinates"] @ plane["axes"]
    off = np.linalg.norm(points[plane["near_rows"]] - lifted, axis=1)
    np.testing.assert_allclose(off, plane["near_off_plane"], atol=1e-10)


def test_the_hull_on_the_plane_is_scipys(finished):
    plane, verdict = finished.load("plane"), finished.load("plane_hull")["verdict"]
    train = finished.load("features")["train"].astype(np.float64)
    across, up = np.linspace(*plane["view"], len(verdict)).T
    assert set(np.unique(verdict)) > {Membership.OUTSIDE}
    for row, column in np.ndindex(verdict.shape):
        point = plane["origin"] + np.array([across[column], up[row]]) @ plane["axes"]
        outside = nearest_in_hull(point, train) > 1e-4
        assert verdict[row, column] in (
            Membership.UNDECIDED, Membership.OUTSIDE if outside else Membership.INSIDE,
        )  # fmt: skip
        assert not outside or verdict[row, column] == Membership.OUTSIDE


def test_a_second_run_computes_nothing(finished, again):
    before = {path: path.stat().st_mtime_ns for path in (again / "data").glob("*.npz")}
    result = run(again)
    assert finished.computed == tuple(NAMES)
    assert result.computed == ()
    for name in NAMES:
        path = again / "data" / f"{name}.npz"
        assert path.stat().st_mtime_ns == before[path]
    assert result.summary == finished.summary


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"num_shown": 2}, {"gallery"}),
        ({"inversion_steps": 4}, {"inversion"}),
        ({"rtol": 1e-4}, {"hull", "class_hulls", "gallery"}),
        ({"title": "another", "batch_size": 7}, set()),
    ],
)
def test_an_option_repeats_what_depends_on_it(again, options, stages):
    result = run(again, **options)
    assert set(result.computed) - {"gallery"} == stages - {"gallery"}
    assert (
        result.load("about")["options"].items()
        >= {name: value for name, value in options.items() if name != "title"}.items()
    )


def test_other_labels_are_not_answered_with_old_results(again):
    labels = (TEST[1] + 1) % 3
    result = run(again, test=(TEST[0], labels))
    assert "hull" not in result.computed
    expected = np.mean(result.load("accuracy")["test_predicted"] == labels)
    assert result.summary["accuracy"]["test_accuracy"] == expected
    np.testing.assert_array_equal(result.load("labels")["test_labels"], labels)


def test_other_parameters_are_not_answered_with_old_results(finished, again):
    network = small_network()
    head = network.head._replace(bias=network.head.bias + np.float32([1, 0, 0]))
    result = run(again, network=hullgeo.Classifier(network.features, head))
    assert {"boundary", "inversion", "plane", "accuracy"} <= set(result.computed)
    assert (
        result.load("boundary")["test_label"].sum() != finished.load("boundary")["test_label"].sum()
    )


def test_a_network_of_other_code_and_equal_parameters_is_noticed(finished, again):
    result = run(again, network=small_network(doubled_features), stages=STAGES[:4])
    np.testing.assert_allclose(
        result.load("features")["test"], 2 * finished.load("features")["test"], rtol=1e-6
    )
    assert "hull" in result.computed


def test_a_damaged_stage_is_computed_again(finished, again):
    path = again / "data" / "hull.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"hull\.npz to be a whole file"):
        hullgeo.load_stage(again, "hull")
    with pytest.warns(RuntimeWarning, match=r"hull\.npz"):
        result = run(again)
    assert result.computed == ("hull",)
    assert_same(everything(again), everything(finished.out))


def test_half_a_run_is_not_read_as_a_whole(again, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(hullgeo.stages, "project_to_hull", stop)
    with pytest.raises(KeyboardInterrupt):
        whole(again, rtol=1e-3)
    with pytest.raises(ValueError, match=r"hull\.npz to belong to the last run"):
        hullgeo.load_stage(again, "hull")
    hullgeo.load_stage(again, "features")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    fsync = os.fsync

    def full(descriptor):
        if "data/.statistics" in os.path.realpath(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    stages = STAGES[:3]
    with pytest.raises(OSError, match=r"statistics\.npz.*No space left.*every finished stage") as e:
        run(tmp_path / "out", stages=stages)
    rescued = Path(str(e.value).split("kept as ")[1].split(":")[0])
    monkeypatch.undo()
    assert not list((tmp_path / "out" / "data").glob(".*"))
    rescued.rename(tmp_path / "out" / "data" / "statistics.npz")
    assert run(tmp_path / "out", stages=stages).computed == ()


def total(inputs):
    def double(rows):
        return {"doubled": 2 * rows}

    return inputs.chunks(double, inputs.data["test"]["images"].reshape(24, -1), 10)


def test_blocks_are_joined_cut_and_removed(tmp_path):
    stage = Stage("total", total, ("test",))
    result = run(tmp_path, stages=(stage,))
    np.testing.assert_array_equal(result.load("total")["doubled"], 2 * TEST[0].reshape(24, -1))
    assert not list((tmp_path / "data").glob("*block*"))
    assert result.summary["findings"] == []


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
import jax
jax.config.update("jax_compilation_cache_dir", {cache!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
import test_analysis
out, moment, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
replace, fsync, writes = os.replace, os.fsync, [0]

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def killing_fsync(descriptor):
    writes[0] += 1
    if (moment, count) == ("mid", writes[0]):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        kill()
    fsync(descriptor)

def killing_replace(source, target):
    if (moment, count) == ("before", writes[0]):
        kill()
    replace(source, target)
    if (moment, count) == ("after", writes[0]):
        kill()

os.fsync, os.replace = killing_fsync, killing_replace
print(*test_analysis.{run}(out).computed)
"""


def light(out):
    """Stages that need no compilation, one of them in blocks; a log of what was computed."""

    def note(line):
        with open(Path(out) / "log", "a") as log:
            log.write(f"{line}\n")

    def numbers(inputs: Inputs):
        note("numbers")
        return {"drawn": np.random.default_rng(0).normal(size=(23, 3))}

    def squares(inputs: Inputs):
        drawn = inputs.data["numbers"]["drawn"]

        def square(rows):
            note(f"block {np.flatnonzero((drawn == rows[0]).all(axis=1))[0]}")
            return {"squares": rows**2}

        return inputs.chunks(square, drawn, 8)

    def total(inputs: Inputs):
        note("total")
        return {"sum": float(inputs.data["squares"]["squares"].sum())}

    stages = (
        Stage("numbers", numbers, ("test",)),
        Stage("squares", squares, ("numbers",)),
        Stage("total", total, ("squares",)),
    )
    return run(out, stages=stages)


def run_killed(tmp_path, function, moment, count):
    code = KILLED.format(
        tests=str(Path(__file__).parent), cache=str(tmp_path / "cache"), run=function
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), moment, str(count)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def inodes(out):
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in (out / "data").glob("*.npz")
        if path.stem not in {"about", "labels"}
    }


def kill_until_done(tmp_path, function, kills):
    """Run, be killed at each of `kills` in turn, and go on; no finished file is ever touched."""
    out, kept = tmp_path / "out", {}
    for moment, count in kills:
        done = run_killed(tmp_path, function, moment, count)
        assert done.returncode == -signal.SIGKILL, done.stderr
        now = inodes(out)
        assert {path: now[path] for path in kept if "block" not in path.name} == {
            path: kept[path] for path in kept if "block" not in path.name
        }
        kept = now
    done = run_killed(tmp_path, function, "never", 0)
    assert done.returncode == 0, done.stderr
    now = inodes(out)
    for path, known in kept.items():
        assert "block" in path.name or now[path] == known
    finished = {path.stem for path in kept if "block" not in path.name}
    assert finished.isdisjoint(done.stdout.split())
    return finished


@pytest.mark.slow
def test_killed_at_every_kind_of_moment(tmp_path):
    # Every run writes what describes it and the labels first; then what is missing of: numbers,
    # three blocks, squares, total, summary, report.
    kills = [
        ("mid", 1),  # the first file of all is half written
        ("mid", 3),  # numbers half written
        ("after", 3),  # numbers finished
        ("mid", 4),  # the first block finished, the second half written
        ("before", 4),  # the second block finished, the third written but not yet in place
        ("mid", 4),  # the third block finished, squares half written
        ("after", 3),  # squares finished, its blocks still there
        ("mid", 4),  # total finished, the summary half written
    ]
    (tmp_path / "out").mkdir()
    assert kill_until_done(tmp_path, "light", kills) == {"numbers", "squares", "total"}
    expected = np.random.default_rng(0).normal(size=(23, 3)) ** 2
    out = tmp_path / "out"
    np.testing.assert_array_equal(hullgeo.load_stage(out, "squares")["squares"], expected)
    assert hullgeo.load_stage(out, "total")["sum"] == expected.sum()
    assert not list((out / "data").glob("squares.block*"))
    log = (out / "log").read_text().splitlines()
    # Only what was half written is computed twice.
    assert {line: log.count(line) for line in log} == {
        "numbers": 2, "block 0": 1, "block 8": 2, "block 16": 2, "total": 1,
    }  # fmt: skip


@pytest.mark.slow
def test_the_whole_analysis_killed_and_finished(tmp_path):
    kills = [("mid", 3), ("before", 5), ("after", 4), ("mid", 5)]
    kill_until_done(tmp_path, "whole", kills)
    once = tmp_path / "once"
    once.mkdir()
    done = run_killed(once, "whole", "never", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [stage.name for stage in STAGES]
    assert_same(everything(tmp_path / "out"), everything(once / "out"))


IMAGES, LABELS = TRAIN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": IMAGES}, r"Expected train to be a pair \(images, labels\)"),
        ({"train": (IMAGES[0], LABELS)}, r"Expected train\[0\]\.shape to be \(n, height"),
        ({"test": (IMAGES[:0], LABELS[:0])}, r"Expected test\[0\]\.shape"),
        ({"test": (IMAGES[:3], LABELS[:2])}, r"Expected test\[1\]\.shape"),
        ({"train": ((255 * IMAGES).astype(np.uint8), LABELS)}, r"train\[0\]\.dtype.*floating"),
        ({"train": (IMAGES, LABELS.astype(float))}, r"train\[1\]\.dtype.*integer"),
        ({"train": (IMAGES, LABELS - 1)}, r"train\[1\]\.min\(\).*>= 0"),
        ({"test": (IMAGES[:3], np.array([0, 3, 1]))}, r"test\[1\]\.max\(\).*head.s classes, 3"),
        ({"test": (IMAGES[:3, :2], LABELS[:3])}, r"test\[0\]\.shape.*\(n, 4, 4, 1\) as in train"),
        ({"train": (255 * IMAGES, LABELS)}, r"train\[0\]\[0, 0, 0, 0\].*bounds=\(0\.0, 1\.0\)"),
        ({"class_names": ["a", "b"]}, "class_names.*3 classes"),
        ({"rtol": -1.0}, "rtol.*>= 0"),
        ({"num_shown": 0}, "num_shown.*>= 1"),
        ({"batch_size": 0}, "batch_size.*>= 1"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
    ],
)
def test_bad_input_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_that_are_not_finite_are_named(tmp_path, value):
    images = IMAGES.copy()
    images[7, 1, 2, 0] = value
    with pytest.raises(ValueError, match=r"train\[0\]\[7, 1, 2, 0\] to be finite"):
        run(tmp_path, train=(images, LABELS))


def test_a_network_that_returns_nan_is_named(tmp_path):
    network = small_network()
    broken = jax.tree.map(lambda weights: weights * jnp.nan, network.features)
    with pytest.raises(ValueError, match=r"Expected finite features.*train image 0"):
        run(tmp_path, network=hullgeo.Classifier(broken, network.head))


def test_a_network_with_one_answer_for_all_is_named(tmp_path):
    network = small_network()
    dead = jax.tree.map(jnp.zeros_like, network.features)
    with pytest.raises(ValueError, match="features of the training images to differ"):
        run(tmp_path, network=hullgeo.Classifier(dead, network.head))


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="Expected out to be a folder that can be written"):
        run(tmp_path / "out")


def test_a_class_without_training_images(tmp_path):
    labels = np.where(TRAIN[1] == 2, 0, TRAIN[1])
    result = run(tmp_path, train=(TRAIN[0], labels), stages=STAGES[:6])
    found = result.load("class_hulls")
    assert np.isinf(found["distance"][:, 2]).all()
    assert np.isfinite(found["distance"][:, :2]).all()
    assert result.report.exists()


def test_every_status_is_success_or_said(finished):
    assert set(np.unique(finished.load("boundary")["test_status"])) == {Status.CONVERGED}
    statuses = np.unique(finished.load("hull")["status"])
    text = finished.report.read_text()
    for status in statuses:
        assert Status(int(status)).name in text
