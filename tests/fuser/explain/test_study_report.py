"""Reports of a search: what was found as values, as text, and as HTML that needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from fuser.explain.report import Group
from fuser.explain.study_charts import charts
from fuser.explain.study_report import render_html, render_text
from fuser.explain.study_summary import RegionResult, StudySummary, TrialRow, best_so_far, changes

BEFORE = (
    Group("gemm", ("a", "b"), 3e-3, True),
    Group("pointwise", ("c",), 1e-3, False),
    Group("gemm", ("d",), 2e-3, True),
    Group("rowwise", ("e",), 1e-3, True),
)
AFTER = (
    Group("gemm", ("a", "b"), 3e-3, True),
    Group("gemm", ("c", "d"), 2e-3, True),
    Group("rowwise", ("e",), 1e-3, True),
)
REGION = RegionResult(
    "0123456789abcdef", 12, "1:0123456789abcdef:8", "1:0123456789abcdef:f", BEFORE, AFTER, "<svg></svg>"
)
TRIALS = (
    TrialRow(0, "path", "complete", 0.030, 0.020, 0.5, "1:0123456789abcdef:8"),
    TrialRow(1, "reward", "failed", None, 0.025, 0.9, "1:0123456789abcdef:9", "wrong numbers"),
    TrialRow(2, "reward", "complete", 0.040, 0.028, 1.5, "1:0123456789abcdef:a"),
    TrialRow(3, "reward", "complete", 0.028, 0.022, 2.5, "1:0123456789abcdef:f"),
    TrialRow(4, "reward", "failed", None, None, 2.75, "1:0123456789abcdef:b", "wrong numbers"),
    TrialRow(5, "reward", "duplicate", None, 0.09, 3.0, "1:0123456789abcdef:c", "another process has it"),
)
STUDY = StudySummary(
    name="tiny",
    model="tiny 1×16",
    strategy="default",
    target="cpu avx512",
    threads=2,
    storage="sqlite:///studies.db",
    trials=TRIALS,
    regions=(REGION,),
    before=0.030,
    after=0.028,
    verified=1.05,
    distinct_programs="16,640",
    rank_correlation=0.875,
    pruned={"predicted above twice the best": 7},
    spent={"building": 2.0, "measuring": 0.9, "searching": 0.1},
    importance={"bit 0": 0.75, "bit 1": 0.25},
)
EMPTY = dataclasses.replace(
    STUDY,
    trials=(),
    regions=(),
    before=None,
    after=None,
    verified=None,
    rank_correlation=None,
    importance={},
    spent={},
)
REFERENCES = r"""(?:src|href)\s*=\s*["'](?!data:)|@import|url\((?!#)"""


def test_values() -> None:
    assert STUDY.counts == {"complete": 3, "failed": 2, "duplicate": 1}
    assert STUDY.strategies == ("path", "reward")
    assert STUDY.best is TRIALS[3]
    assert STUDY.speedup == pytest.approx(30 / 28)
    assert STUDY.reasons == {("failed", "wrong numbers"): 2, ("duplicate", "another process has it"): 1}
    assert EMPTY.best is None and EMPTY.speedup is None
    values = json.loads(json.dumps(STUDY.as_dict()))
    assert values["best"]["number"] == 3
    assert values["counts"]["failed"] == 2
    assert "picture" not in values["regions"][0]


def test_best_so_far_counts_trials_without_a_time() -> None:
    assert best_so_far(TRIALS[1:]) == [(2, 1.5, 0.040), (3, 2.5, 0.028), (4, 2.75, 0.028), (5, 3.0, 0.028)]
    assert best_so_far(TRIALS[4:]) == []


def test_changes_are_the_finest_sets_that_no_scheme_cuts() -> None:
    found = changes(REGION)
    assert [change.operators for change in found] == [("a", "b"), ("c", "d"), ("e",)]
    assert [change.seconds_before for change in found] == pytest.approx([3e-3, 3e-3, 1e-3])
    assert [change.seconds_after for change in found] == pytest.approx([3e-3, 2e-3, 1e-3])
    crossing = dataclasses.replace(
        REGION,
        after=(
            Group("gemm", ("a",), 1e-3, True),
            Group("gemm", ("b", "c"), 1e-3, True),
            Group("gemm", ("d", "e"), 1e-3, True),
        ),
    )
    assert [change.operators for change in changes(crossing)] == [("a", "b", "c"), ("d", "e")]


def test_text_says_what_was_found() -> None:
    text = render_text(STUDY)
    assert "6 of strategy default: 3 complete, 2 failed, 1 duplicate" in text
    assert "16,640 distinct programs" in text
    assert "28 ms, 1.071 times as fast as the default scheme, 1.050 times when measured again" in text
    assert "measured times 0.875" in text
    assert "7 kernels: predicted above twice the best" in text
    assert "2 trials: wrong numbers" in text
    assert "7 ms → 6 ms each" in text
    assert "0 of strategy default: 0 complete" in render_text(EMPTY)


def test_html_stands_alone() -> None:
    html = render_html(STUDY)
    assert not re.search(REFERENCES, html)
    assert REGION.picture in html
    for text in (
        "16,640",
        "0.875",
        "1.071×",
        "1.050×",
        "wrong numbers",
        "predicted above twice the best",
        REGION.scheme_after,
    ):
        assert text in html
    # The pair c, d takes a third less.
    assert "-33.3 %" in html
    assert "No trial is complete yet" in render_html(EMPTY)


def test_charts_are_svg_without_references() -> None:
    pytest.importorskip("matplotlib")
    found = charts(STUDY)
    assert set(found) == {"convergence", "model", "importance", REGION.hash}
    for uri in found.values():
        svg = base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")).decode()
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)|@import|url\((?!#)""", svg)
    assert charts(STUDY) == found
    assert charts(EMPTY) == {}


def test_without_matplotlib_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = render_html(STUDY)
    assert "matplotlib is not installed" in html
    assert "data:image" not in html
    assert "-33.3 %" in html


def test_text_of_others_is_escaped() -> None:
    evil = "<script>alert(1)</script> $x^"
    trials = (
        *TRIALS,
        TrialRow(6, evil, "complete", 0.05, 0.05, 4.0, "s"),
        TrialRow(7, "x", "failed", None, 1, 5, "s", evil),
    )
    region = dataclasses.replace(REGION, before=(Group(evil, ("a", evil), 1e-3, True),), after=(AFTER[0],))
    study = dataclasses.replace(
        STUDY, name=evil, model=evil, storage=evil, trials=trials, regions=(region,), importance={evil: 1.0}
    )
    assert "<script" not in render_html(study)


def test_a_study_whose_model_is_not_at_hand() -> None:
    html = render_html(dataclasses.replace(STUDY, regions=(dataclasses.replace(REGION, picture=""),), importance={}))
    assert "cannot be drawn" in html
    assert "too few trials" in html
