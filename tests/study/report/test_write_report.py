import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offsite.errors import UsageError
from offsite.study.recipe import ROWS
from offsite.study.report.frontier_plots import gains_frontier
from offsite.study.report.plots import _running_mean, read_curve
from offsite.study.report.read_results import read_results
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
        base_parameters={"verbatim": 0.625, "compressed": 0.25, "not_sent": 0.125}, arithmetic=0.55,
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
    assert dict(zip(recovered.head, recovered.lines[0], strict=True)) == {
        "data set": "sums", "compress": "drop | 8", "placement": "2-8-2", "tuning": "LoRA",
        "plug-in against zero-shot, nats": "-0.500 [-0.600, -0.400]",
        "emulator against zero-shot, nats": "+1.000 [+0.900, +1.100]", "gain recovered, %": "50 [40, 60]",
        "emulator's own gain, %": "25", "arithmetic, %": "55", "base sent verbatim, %": "62.5",
        "bound recovered, %": "62",
        "plug-in gap, nats": "-1.500", "bundle, MiB": "100.0",
    }  # fmt: skip
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
        "results.json", "report.md", "report.html", "rows.png", "frontier.png", "sizes.png", "curves.png",
    }  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4
    for column in ("gain recovered, %", "emulator&#x27;s own gain, %", "base sent verbatim, %"):
        assert f'<th class="n">{column}</th>' in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page.lower().replace("http-equiv", "")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "about &lt;them&gt;" in page
    assert page.count("<td") == page.count("</td>")
    text = (tmp_path / "report.md").read_text()
    assert "| sums | drop / 8 | 2-8-2 | LoRA |" in text
    assert "![Training curves](plots/curves.png)" in text
    assert "| gain recovered, % | emulator's own gain, % | arithmetic, % | base sent verbatim, % |" in text
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
    assert "[study]" in advice
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["cells"][0]["gain_recovered"] == {"value": 0.5, "low": 0.4, "high": 0.6}
    assert written["cells"][0]["own_gain"]["value"] == 0.25
    assert written["cells"][0]["base_parameters"]["verbatim"] == 0.625
    assert written["cells"][0]["scores"]["plug_in"]["loss"]["value"] == 2.5


def test_a_cell_that_failed_altogether_is_reported(tmp_path: Path) -> None:
    nothing = point(tmp_path, scores={}, placement=None, bundle_bytes=None, return_bytes=None, gain_recovered=None,
                   bound_recovered=None, own_gain=None, plug_in_gap=None, base_parameters=None, arithmetic=None,
                   errors={"plug_in": "no"}, log=None)  # fmt: skip
    write_report(results(nothing), tmp_path)
    assert failures(results(nothing)) == ["sums, drop | 8, ?, LoRA, seed 0: plug-in: no"]
    assert tables(results(nothing))[0].lines[0][-1] == "failed"


def _frontier(*points: GridPointResult) -> Any:
    figure = gains_frontier(groups(results(*points)))
    return [] if figure is None else figure.axes


def _named(axes: Any) -> list[str]:
    """The lines of the list of names, in the order of their numbers."""
    lines: list[str] = axes.texts[-1].get_text().splitlines()
    return [line.removeprefix(f"{number}  ") for number, line in enumerate(lines, start=1)]


def _points(axes: Any) -> list[tuple[float, float]]:
    return [tuple(map(float, at)) for at in axes.collections[-1].get_offsets()]


def test_the_frontier_has_gain_recovered_over_the_emulators_own(tmp_path: Path) -> None:
    one = point(tmp_path)
    other = replace(one, compress="keep 4", gain_recovered=Figure(0.9), own_gain=Figure(-0.1), base_parameters=None)
    (axes,) = _frontier(one, other)
    assert sorted(_points(axes)) == [(pytest.approx(-10.0), pytest.approx(90.0)), (25.0, 50.0)]
    assert _named(axes) == ["keep 4", "drop | 8 (62 % verbatim)"]  # from left to right
    assert "emulator's own gain" in axes.get_xlabel()
    assert "gain recovered" in axes.get_ylabel()
    assert axes.get_xlim()[0] < -10
    assert axes.get_ylim()[1] > 90


def test_the_frontier_of_one_bundle_has_its_data_sets(tmp_path: Path) -> None:
    one = point(tmp_path)
    (axes,) = _frontier(one, replace(one, dataset="other"))
    assert axes.get_title() == "all data sets"
    assert sorted(_named(axes)) == ["other (62 % verbatim)", "sums (62 % verbatim)"]
    two = [replace(one, compress=name, dataset=data) for name in ("a", "b") for data in ("sums", "other")]
    assert [axes.get_title() for axes in _frontier(*two)] == ["sums, LoRA", "other, LoRA"]


def test_no_frontier_where_gains_are_not_known(tmp_path: Path) -> None:
    one = point(tmp_path)
    assert _frontier(one) == []
    assert _frontier(one, replace(one, compress="keep 4", own_gain=None)) == []


def test_the_frontier_of_seeds_is_their_mean(tmp_path: Path) -> None:
    one = point(tmp_path)
    seeds = [replace(one, seed=1, gain_recovered=Figure(0.7), own_gain=Figure(0.35)), replace(one, compress="b")]
    (axes,) = _frontier(one, *seeds)
    assert (pytest.approx(30.0), pytest.approx(60.0)) in _points(axes)


def test_results_are_read_again(tmp_path: Path) -> None:
    found = results(point(tmp_path), point(tmp_path, scores={}, base_parameters=None, gain_recovered=None))
    write_report(found, tmp_path)
    read = read_results(tmp_path / "results.json")
    assert tables(read) == tables(found)
    assert [one.gain_recovered for one in read.cells] == [one.gain_recovered for one in found.cells]
    (tmp_path / "results.json").write_text('{"rows": []}')
    with pytest.raises(UsageError, match="holds no results of a study") as caught:
        read_results(tmp_path / "results.json")
    assert "title: Field required" in caught.value.reasons


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
