"""Reports are one file that needs nothing else, and hold the user's text as text."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from cluster.store import ClusterError
from pipelines import figures
from pipelines.evaluating.calibration import reliability
from pipelines.report import Figure, Section, Table, Text, render

HOSTILE = "<script>alert('x')</script> $\\frac{1}$ & 新闻"


def all_figures() -> list[str]:
    shaky = reliability(np.array([[0.6, 0.4], [0.2, 0.8]]), np.array([0, 0]), multi=False)
    return [
        figures.bars({HOSTILE: 0.5, "b": 1.0}, "share"),
        figures.bars({"a": [0.1, 0.2], "b": [0.3, 0.4]}, "share", ("one", "two")),
        figures.bars({}, "nothing"),
        figures.histogram([1, 2, 2, 3], "tokens", marks={"cut": 2.5}),
        figures.counted_histogram([0, 1, 2], [5, 6], "tokens"),
        figures.curves({"loss": [(0, 1.0), (1, 0.5)], "none yet": []}, "step", "loss"),
        figures.confusion_matrix(np.array([[3, 1], [0, 0]]), (HOSTILE, "b")),
        figures.confusion_matrix(np.eye(77, dtype=np.int64), [f"class {i}" for i in range(77)]),
        figures.reliability_diagram(shaky, shaky),
        figures.reliability_diagram(shaky, None),
    ]


def test_a_report_is_self_contained_and_escapes_text(tmp_path: Path) -> None:
    path = UPath(tmp_path / "deep" / "report.html")
    table = Table((HOSTILE, "n", "share"), [(HOSTILE, 12345, 0.25), ("b", 1, None)], HOSTILE)
    sections = [Section(HOSTILE, [Text(HOSTILE), table]), Section("f", [Figure(svg, HOSTILE) for svg in all_figures()])]
    render(path, HOSTILE, sections, facts=[("accuracy", HOSTILE)], note=HOSTILE)
    html = path.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "12,345" in html
    assert "0.250" in html
    assert not re.search(
        r"""(src|href)\s*=\s*["'](?!#)""", html.replace("xlink:href", "href").replace('href="data:', "")
    )
    assert "@import" not in html
    assert "url(http" not in html
    assert "prefers-color-scheme: dark" in html
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_figures_are_well_formed_take_the_page_s_colour_and_repeat() -> None:
    for first, second in zip(all_figures(), all_figures(), strict=True):
        assert ET.fromstring(first).tag.endswith("svg")
        assert "currentColor" in first
        assert first == second


def test_a_report_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match=r"cannot write to .*report\.html"):
        render(UPath(tmp_path / "file" / "report.html"), "t", [])
