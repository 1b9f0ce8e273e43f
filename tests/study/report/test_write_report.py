import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offsite.study.recipe import ROWS
from offsite.study.report.plots import _running_mean, read_curve
from offsite.study.report.report_tables import failures, groups, names, tables
from offsite.study.report.results import Figure, GridPointResult, Results, RowResult
from offsite.study.report.write_report import strict, write_report


def point(folder: Path, **changes: Any) -> GridPointResult:
    log = folder / "log.jsonl"
    steps = [{"event": "step", "step": i, "loss": 4 - i / 10} for i in range(1, 9)]
    log.write_text("".join(json.dumps(step) + "\n" for step in steps))
    losses = dict(zip(ROWS, (3.0, 6.0, 2.0, 2.2, 4.0, 2.5), strict=True))
    scores = {
        row: RowResult(Figure(loss, loss - 0.1, loss + 0.1), Figure(loss), None,
                       Figure(loss - 3, loss - 3.1, loss - 2.9), None, None, None, None, 10, 99)
        for row, loss in losses.items()
    }  # fmt: skip
    made = GridPointResult(
        dataset="sums", score="loss", compress="drop | 8", placement="2-8-2", tune="LoRA", method="lora", seed=0,
        scores=scores, gain_recovered=Figure(0.5, 0.4, 0.6), bound_recovered=Figure(0.625),
        own_gain=Figure(0.25), plug_in_gap=Figure(-1.5),
        bundle_bytes=100 * 2**20, return_bytes=2**20, seconds={"model-owner": 3.0, "data-owner": 61.0},
        peak_bytes={"data-owner": 2**30}, spent=[], errors={}, log="log.jsonl",
    )  # fmt: skip
    return replace(made, **changes)


def results(*points: GridPointResult) -> Results:
    return Results("Sums & more", "about <them>", "base", "loss", list(ROWS), {"offsite": "1"}, points)


def test_tables_say_what_was_found(tmp_path: Path) -> None:
    loss, recovered, costs = tables(results(point(tmp_path)))
    assert loss.lines == (
        ("sums", "drop | 8", "2-8-2", "LoRA", "3.000 ± 0.100", "6.000 ± 0.100", "2.000 ± 0.100", "2.200 ± 0.100",
         "4.000 ± 0.100", "2.500 ± 0.100"),
    )  # fmt: skip
    assert recovered.lines[0][4:] == ("-0.500 [-0.600, -0.400]", "50 [40, 60]", "25", "62", "-1.500", "100.0")
    assert costs.lines[0][4:] == ("100.0", "1.0", "3", "61", "", "1,024.0")


def test_seeds_are_averaged(tmp_path: Path) -> None:
    one = point(tmp_path)
    other = replace(one, seed=1, scores=one.scores | {"plug_in": replace(one.scores["plug_in"], primary=Figure(2.7))})
    (line,) = tables(results(one, other))[0].lines
    assert line[-1] == "2.600 ± 0.141"
    assert line[4] == "3.000 ± 0.100"  # the same in both: its interval over rows


def test_accuracy_has_a_table_where_it_was_asked_for(tmp_path: Path) -> None:
    one = point(tmp_path)
    asked = replace(one.scores["plug_in"], accuracy=0.5, accuracy_stderr=0.1)
    shown = tables(results(replace(one, score="accuracy", scores=one.scores | {"plug_in": asked})))
    table = next(table for table in shown if table.title == "Accuracy")
    assert table.lines[0][-1] == "50.0 ± 10.0"
    assert len(shown) == 4


def test_groups_are_named_by_what_differs(tmp_path: Path) -> None:
    one = point(tmp_path)
    made = groups(results(one, replace(one, tune="full"), replace(one, dataset="other")))
    assert names(made) == {("drop | 8", "2-8-2", "LoRA"): "LoRA", ("drop | 8", "2-8-2", "full"): "full"}
    apart = groups(results(one, replace(one, placement="4-8-0")))
    assert set(names(apart).values()) == {"2-8-2", "4-8-0"}
    assert set(names(groups(results(one))).values()) == {"drop | 8"}


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    broken = point(tmp_path, compress="keep 4", bundle_bytes=50 * 2**20, errors={"full": "diverged\n  - <script>"})
    files, advice = write_report(results(point(tmp_path), broken), tmp_path)
    assert advice is None
    assert {file.name for file in files} == {
        "results.json", "report.md", "report.html", "rows.png", "frontier.png", "curves.png",
    }  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page.lower().replace("http-equiv", "")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "about &lt;them&gt;" in page
    assert page.count("<td") == page.count("</td>")
    text = (tmp_path / "report.md").read_text()
    assert "| sums | drop / 8 | 2-8-2 | LoRA |" in text
    assert "![Training curves](plots/curves.png)" in text
    assert "keep 4, 2-8-2, LoRA, seed 0: full fine-tuning: diverged - <script>" in text
    widths = {line.count("|") for line in text.split("## Held-out loss")[1].split("##")[0].splitlines() if "|" in line}
    assert len(widths) == 1
    for file in files:
        if file.suffix == ".png":
            assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    files, advice = write_report(results(point(tmp_path)), tmp_path)
    assert {file.name for file in files} == {"results.json", "report.md", "report.html"}
    assert advice is not None
    assert "pip install 'offsite-tuning[study]'" in advice
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["cells"][0]["gain_recovered"] == {"value": 0.5, "low": 0.4, "high": 0.6}
    assert written["cells"][0]["scores"]["plug_in"]["loss"]["value"] == 2.5


def test_a_cell_that_failed_altogether_is_reported(tmp_path: Path) -> None:
    nothing = point(tmp_path, scores={}, placement=None, bundle_bytes=None, return_bytes=None, gain_recovered=None,
                   bound_recovered=None, own_gain=None, plug_in_gap=None, errors={"plug_in": "no"},
                   log=None)  # fmt: skip
    write_report(results(nothing), tmp_path)
    assert failures(results(nothing)) == ["sums, drop | 8, ?, LoRA, seed 0: plug-in: no"]
    assert tables(results(nothing))[0].lines[0][-1] == "failed"


def test_a_curve_is_the_last_run(tmp_path: Path) -> None:
    records = [
        {"event": "start", "step": 0}, {"event": "step", "step": 1, "loss": 9.0},
        {"event": "start", "step": 0}, {"event": "step", "step": 1, "loss": 3.0},
        {"event": "step", "step": 2, "loss": 2.5},
        {"event": "resume", "step": 1}, {"event": "step", "step": 2, "loss": 2.0},
        {"event": "validation", "step": 2, "loss": 4.0},
    ]  # fmt: skip
    (tmp_path / "log").write_text("".join(json.dumps(one) + "\n" for one in records) + '{"event": "st')
    assert read_curve(tmp_path / "log") == {"step": [(1, 3.0), (2, 2.0)], "validation": [(2, 4.0)]}
    assert _running_mean([1.0, 2.0, 3.0]) == [1.5, 2.0, 2.5]


def test_json_is_strict() -> None:
    assert strict({"a": [float("inf"), (1.0, float("nan"))]}) == {"a": [None, [1.0, None]]}
