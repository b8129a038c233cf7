"""The report is one file, says what the arrays say, and says how certain it is."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats
import test_analysis
from sklearn.metrics import roc_auc_score

import hullgeo
from hullgeo import Membership, Status, sections, telling
from hullgeo.report import write_report
from hullgeo.stages import STAGES

pytestmark = pytest.mark.slow  # minutes of compiling

NAMES = ["cat & dog", "<b>bold</b>", "three"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return test_analysis.run(out, title="small <net>", class_names=NAMES, stages=STAGES)


@pytest.fixture(scope="module")
def data(finished):
    about = finished.load("about")
    return {name: finished.load(name) for name in ("about", "labels", *about["stages"])}


class Page(HTMLParser):
    """Tags, attributes, and the text of each element of interest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.figures = [], [], [], []
        self.skip = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.skip = tag == "style"
        if tag == "figure":
            self.figures.append("")

    def handle_data(self, text):
        if not self.skip:
            self.text.append(text)
            if self.figures:
                self.figures[-1] += text


@pytest.fixture(scope="module")
def page(finished):
    return Page(finished.report.read_text())


def test_the_file_needs_nothing_else(page, finished):
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        if name in {"src", "srcset"}:
            assert value.startswith("data:image/")
        if name == "href":
            assert value.startswith("#")
    assert "url(" not in finished.report.read_text()
    assert not list(finished.out.glob("*.png"))


def test_links_lead_somewhere(page):
    ids = {value for name, value in page.attributes if name == "id"}
    links = {value[1:] for name, value in page.attributes if name == "href"}
    assert links <= ids
    assert {section.__name__ for section, _ in sections.SECTIONS} <= links


def test_every_figure_says_what_is_seen_and_how_certain(page):
    assert len(page.figures) >= 9
    for text in page.figures:
        seen, _, certain = text.partition("How certain.")
        assert len(seen.split()) > 5, text
        assert len(certain.split()) > 3, text


def test_pictures_have_words(page):
    alternatives = [value for name, value in page.attributes if name == "alt"]
    assert len(alternatives) == page.tags.count("img")
    assert all(alternatives)


def test_names_are_escaped(page, finished):
    text = finished.report.read_text()
    assert "small <net>" not in text
    assert "<b>bold" not in text
    assert "small <net>" in "".join(page.text)
    assert "“<b>bold</b>”" in "".join(page.text)


def test_the_report_is_drawn_from_the_saved_data_alone(finished):
    before = finished.report.read_bytes()
    finished.report.unlink()
    path, summary = write_report(finished.out)
    assert path.read_bytes() == before
    assert summary == finished.summary


def test_summary_is_strict_json_and_equals_the_arrays(finished, data):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    summary = json.loads((finished.out / "summary.json").read_text(), parse_constant=refuse)
    assert summary == finished.summary
    verdict = data["hull"]["verdict"]
    assert summary["hull"]["num_outside"] == (verdict == Membership.OUTSIDE).sum()
    assert summary["hull"]["num_inside"] == (verdict == Membership.INSIDE).sum()
    unit = data["statistics"]["diameter_lower"]
    outside = data["hull"]["distance"][verdict == Membership.OUTSIDE] / unit
    assert summary["hull"]["median_outside_over_diameter"] == pytest.approx(np.median(outside))
    near = data["boundary"]["test_distance"] / unit
    assert summary["boundary"]["median_over_diameter"] == pytest.approx(np.median(near))
    correct = data["accuracy"]["test_predicted"] == data["labels"]["test_labels"]
    assert summary["boundary"]["probability_wrong_is_nearer"] == pytest.approx(
        roc_auc_score(~correct, -near)
    )
    assert summary["versions"]["hullgeo"] == hullgeo.__version__
    assert len(summary["findings"]) >= 5


def test_the_text_holds_the_numbers(page, finished):
    text = "".join(page.text).replace("\u00a0", " ")
    summary, total = finished.summary, 24
    right = summary["accuracy"]["test_correct"]
    assert f"right class to {right} of {total} test images ({100 * right / total:.1f} %)" in text
    outside = summary["hull"]["num_outside"]
    assert f"{outside} of {total} test images ({100 * outside / total:.1f} %) lie outside" in text
    for value in summary["options"].values():
        assert str(value) in text
    for digest in summary["digests"].values():
        assert digest in text


def test_every_stage_is_told():
    told = {name for _, needs in sections.SECTIONS for name in needs}
    assert {stage.name for stage in STAGES} - told <= {"features"}


def test_sections_follow_the_stages_there_are(tmp_path):
    result = test_analysis.run(tmp_path, stages=STAGES[:3])
    assert {"accuracy", "statistics"} <= set(result.summary)
    assert "hull" not in result.summary


def changed(data, stage, **values):
    return {**data, stage: {**data[stage], **values}}


@pytest.mark.parametrize("verdict", list(Membership))
def test_hull_section_for_every_verdict(data, verdict):
    total = len(data["hull"]["verdict"])
    lower = data["hull"]["distance"] if verdict == Membership.OUTSIDE else 0 * data["hull"]["lower"]
    uniform = changed(data, "hull", verdict=np.full(total, int(verdict)), lower=lower)
    section = sections.hull(uniform)
    assert section.summary[f"num_{verdict.name.lower()}"] == total
    proved = f"all {total}" if verdict != Membership.UNDECIDED else f"none of {total}"
    assert section.certificates[0].proved == proved
    words = section.findings[0] + section.blocks[0].seen + section.blocks[0].certain
    assert ("lie provably outside" in words) == (verdict == Membership.OUTSIDE)
    assert ("undecided ones are at most" in words) == (verdict == Membership.UNDECIDED)
    assert "nan" not in words


def test_sections_where_everything_is_right(data):
    labels = data["accuracy"]["test_predicted"]
    perfect = changed(data, "labels", test_labels=labels)
    perfect = changed(
        perfect, "accuracy", test_correct=len(labels), test_accuracy=1.0,
        confusion=np.diag(np.bincount(labels, minlength=3)),
    )  # fmt: skip
    perfect = changed(perfect, "gallery", wrong=np.zeros(0, int))
    for section in (tell(perfect) for tell, _ in sections.SECTIONS):
        words = " ".join([*section.findings, section.lead, *(b.seen for b in section.blocks)])
        assert "nan" not in words
        assert "mistakes sit" not in words
    assert sections.boundary(perfect).summary["probability_wrong_is_nearer"] is None


def test_a_failed_row_is_not_called_proved(data):
    status, distance = (data["boundary"][f"test_{name}"].copy() for name in ("status", "distance"))
    status[3], distance[3] = Status.NONFINITE, np.nan
    broken = changed(data, "boundary", test_status=status, test_distance=distance)
    section = sections.boundary(broken)
    assert section.summary["num_proved"] == len(status) - 1
    assert section.certificates[0].open == "1"
    assert np.isfinite(section.summary["median_over_diameter"])


def test_a_failed_hull_distance_is_said_to_be_unknown(data):
    distance, lower = data["hull"]["distance"].copy(), data["hull"]["lower"].copy()
    verdict, status = data["hull"]["verdict"].copy(), data["hull"]["status"].copy()
    row = int(data["gallery"]["ambiguous"][0])
    distance[row], lower[row], verdict[row], status[row] = np.nan, np.nan, 0, Status.NONFINITE
    each, each_lower = (data["class_hulls"][name].copy() for name in ("distance", "lower"))
    each[row], each_lower[row] = np.nan, np.nan
    broken = changed(
        data, "hull", distance=distance, lower=lower, verdict=verdict, status=status
    )  # fmt: skip
    broken = changed(broken, "class_hulls", distance=each, lower=each_lower)
    section = sections.hull(broken)
    assert "For 1 images nothing is known" in section.blocks[0].certain
    assert section.summary["num_undecided"] >= 1
    told = [sections.class_hulls(broken), sections.boundary(broken), sections.gallery(broken)]
    assert int(told[0].certificates[0].open) >= 1
    for told_section in (section, *told):
        words = " ".join([*told_section.findings, *(b.seen for b in told_section.blocks)])
        assert "nan" not in words
        assert "inf " not in words
    cards = [card for block in told[2].blocks for card in block.cards]
    assert any("hull unknown" in card.lines for card in cards)


def test_nothing_to_report_on(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path)


@pytest.mark.parametrize(("count", "total"), [(0, 5), (5, 5), (9, 10), (352, 360)])
def test_wilson_is_scipys(count, total):
    low, high = telling.wilson(count, total)
    expected = scipy.stats.binomtest(count, total).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_rank_probability_is_the_area_under_the_curve():
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 9, size=30), rng.integers(0, 7, size=50)
    expected = roc_auc_score(np.repeat([1, 0], [30, 50]), np.concatenate([left, right]))
    assert telling.rank_probability(left, right) == pytest.approx(expected)
    assert telling.rank_probability(left[:0], right) is None


def test_counts_in_words():
    assert re.sub("\u00a0", " ", telling.of(352, 360, "images")) == "352 of 360 images (97.8 %)"
    assert telling.of(5, 5, "images") == "all 5 images"
    assert telling.of(0, 5) == "none of 5"
    assert telling.of(1999, 2000).endswith("(99.95\u00a0%)")
    assert [telling.times(np.full(3, count)) for count in (0, 1, 2, 5)] == [
        "never", "once", "twice", "5 times",
    ]  # fmt: skip
    assert telling.times(np.array([2, 1, 3])) == "1 to 3 times"
