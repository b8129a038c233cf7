"""The report of an analysis: one self-contained HTML file, told from the saved data alone.

`hullgeo.sections` says what is told; this module gathers it, renders the template, and writes the
same numbers as JSON. The network and its images are not needed.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from hullgeo import _store
from hullgeo.result import Status
from hullgeo.sections import SECTIONS
from hullgeo.staging import load_stage
from hullgeo.telling import Data

_TIMES = " \u00d7 "


def write_report(out: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Write `report.html` and `summary.json` from the saved stages of an analysis.

    Args:
      out: the folder given to `analyze`.

    Returns:
      the path of the report, and the summary as it stands in `summary.json`.

    Raises:
      FileNotFoundError: if `out` holds no analysis.
      ValueError: if a stage's file is damaged or was not completed, naming it.
      OSError: if the report cannot be written.
    """
    folder = Path(out)
    about = load_stage(folder, "about")
    stages = about["stages"]
    data: Data = {"about": about} | {name: load_stage(folder, name) for name in ("labels", *stages)}
    sections = [tell(data) for tell, needs in SECTIONS if set(needs) <= set(data)]
    summary = _finite({
        "title": about["title"],
        "findings": [finding for section in sections for finding in section.findings],
        **{section.name: section.summary for section in sections},
        **{name: about[name] for name in ("options", "digests", "versions")},
    })  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hullgeo"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template("report.html").render(
        about=about,
        facts=_facts(data),
        sections=sections,
        findings=summary["findings"],
        certificates=[row for section in sections for row in section.certificates],
        statuses=_statuses(data),
        files=[
            (name, _store.read(folder / "data" / f"{name}.npz").seconds, _shapes(data[name]))
            for name in ("labels", *stages)
        ],
    )
    _store.write_bytes(folder / "summary.json", json.dumps(summary, indent=1).encode())
    _store.write_bytes(folder / "report.html", html.encode())
    return folder / "report.html", summary


def _facts(data: Data) -> str:
    """What was analysed, in one line."""
    labels, shape = data["labels"], _TIMES.join(map(str, data["about"]["image_shape"]))
    return (
        f"{len(labels['test_labels']):,} test and {len(labels['train_labels']):,} training images "
        f"of {shape} pixels, {len(data['about']['class_names'])} classes"
    )


def _statuses(data: Data) -> list[tuple[Status, int]]:
    """Every status that occurs anywhere in the stages, and how often."""
    arrays = [
        np.ravel(array)
        for values in data.values()
        for name, array in values.items()
        if name.endswith("status")
    ]
    codes, counts = np.unique(np.concatenate([*arrays, np.zeros(0, int)]), return_counts=True)
    return [(Status(int(code)), int(count)) for code, count in zip(codes, counts, strict=True)]


def _shapes(values: dict[str, Any]) -> list[str]:
    """What a stage's file holds, in words."""
    return [
        f"{name} ({_TIMES.join(map(str, value.shape))})"
        for name, value in values.items()
        if isinstance(value, np.ndarray)
    ]


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: both become null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
