"""The plots of a report, as PNG files (the extra `study`). Colours: Okabe and Ito's, for the colour-blind too."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite.extras import require
from offsite.study.metric import METRICS, Metric
from offsite.study.report.frontier_plots import bundle_sizes, gains_frontier
from offsite.study.report.panels import COLOURS, panels
from offsite.study.report.report_tables import LABELS, Group, curve_file, groups, names, score_of
from offsite.study.report.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#8c8c8c")
_DASHES = ("-", "--", ":", "-.")
_PANELS = 24  # most panels in one file
_FRONTIER = (
    "Shares of full fine-tuning's gain over zero-shot: what the model's owner gets (plug-in), by what the data owner "
    "has without the owner (emulator, tuned). The best bundles are at the top left. In brackets: the share of the "
    "base's parameters whose values are in the bundle unchanged. Whiskers: 95 % intervals over test rows."
)
_STYLE = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 150,
}


@dataclass(frozen=True)
class Plot:
    """An image in the report: its file, its title, and a description of its content."""

    file: Path
    title: str
    description: str


def require_matplotlib() -> Any:
    """Import matplotlib.

    Raises:
        UsageError: matplotlib is not installed.
    """
    return require("matplotlib", "study", "drawing the plots of a study")


def draw(results: Results, folder: Path) -> list[Plot]:
    """Draw every plot for which the results have data.

    Args:
        results: the results of the study.
        folder: the study's folder; plots are written to its `plots/`.

    Raises:
        UsageError: matplotlib is not installed.
    """
    matplotlib = require_matplotlib()
    made = []
    with matplotlib.rc_context(_STYLE):
        for name, title, description, figure in _figures(results, folder):
            if figure is None:
                continue
            file = folder / "plots" / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file)
            made.append(Plot(file, title, description))
    return made


def _figures(results: Results, folder: Path) -> list[tuple[str, str, str, "Figure | None"]]:
    """All plots as (file name, title, description, figure); the figure is None if the results have no data for it."""
    grouped, metric = groups(results), METRICS[results.primary]
    better = f"{'higher' if metric.higher_is_better else 'lower'} is better"
    return [
        (
            "rows",
            "Every row in the house order",
            f"{metric.title} of each model, {better}; dashed: zero-shot; whiskers: 95 % intervals over test rows.",
            _bars(results, grouped),
        ),
        (
            "frontier",
            "Gain recovered against the emulator's own gain",
            _FRONTIER,
            gains_frontier(grouped),
        ),
        (
            "sizes",
            f"Bundle size against {metric.name}",
            f"What the model's owner gets (plug-in) and the data owner has (emulator, tuned) by bundle size; {better}.",
            bundle_sizes(grouped, metric),
        ),
        (
            "curves",
            "Training curves",
            "Loss on the emulator (faint: single steps; strong: their running mean); diamonds: held-out rows.",
            _curves(results, grouped, folder),
        ),
    ]


def _bars(results: Results, grouped: Sequence[Group]) -> "Figure | None":
    """Plot the losses (for pictures, accuracies) of all models as bars, a panel for each group; None without scores."""
    shown = [group for group in grouped if any(point.scores for point in group.points)][:_PANELS]
    if not shown:
        return None
    short = names(grouped)
    rows = [[row for row in results.rows if group.mean(score_of(row)) is not None] for group in shown]
    longest: dict[str, float] = {}  # by data set: its panels have one scale
    for group, there in zip(shown, rows, strict=True):
        longest[group.dataset] = max(longest.get(group.dataset, 0.0), *_ends(group, there))
    metric = METRICS[results.primary]
    abreast = len(short) if len(short) in (2, 3) else 3  # where it fits, a line for each data set
    figure, all_axes = panels(len(shown), 4.4, 0.85 + 0.27 * len(results.rows), most=abreast)
    for axes, group, there in zip(all_axes, shown, rows, strict=True):
        _one_bars(axes, group, there, metric)
        axes.set_xlim(0, 1.2 * longest[group.dataset] * metric.scale)
        axes.set_title(f"{group.dataset}: {short[group.words[1:]]}", fontsize=9)
    return figure


def _one_bars(axes: "Axes", group: Group, rows: Sequence[str], metric: Metric) -> None:
    """Draw the panel of one group: a bar for each model (`rows` of the result table, as "plug_in"), with error bars."""
    means = [metric.scale * (group.mean(score_of(row)) or 0.0) for row in rows]
    places = range(len(rows))
    colours = [COLOURS[row] for row in rows]
    if "zero_shot" in rows:
        axes.axvline(means[rows.index("zero_shot")], color="#555555", linestyle="--", linewidth=0.9, zorder=0)
    whiskers = [[metric.scale * one for one in side] for side in _whiskers(group, rows)]
    axes.barh(places, means, color=colours, height=0.72, xerr=whiskers, ecolor="#555555")
    for place, mean, above in zip(places, means, whiskers[1], strict=True):
        axes.annotate(
            f"{mean:.{metric.places}f}", (mean + above, place), (4, 0), textcoords="offset points", va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    axes.set_yticks(places, [LABELS[row] for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(metric.axis)


def _whiskers(group: Group, rows: Sequence[str]) -> Any:
    """Lengths of the error bars below and above each bar: the range over seeds, else the interval over test rows."""
    ends = []
    for row in rows:
        values = group.values(score_of(row))
        figure = next(point.scores[row].primary for point in group.points if row in point.scores)
        mean = sum(values) / len(values)
        if len(set(values)) > 1:
            ends.append((mean - min(values), max(values) - mean))
        elif figure.low is not None and figure.high is not None:
            ends.append((mean - figure.low, figure.high - mean))
        else:
            ends.append((0.0, 0.0))
    return [[low for low, _ in ends], [high for _, high in ends]]


def _ends(group: Group, rows: Sequence[str]) -> list[float]:
    """The upper end of the error bar of each model in `rows`."""
    above = _whiskers(group, rows)[1]
    return [(group.mean(score_of(row)) or 0.0) + more for row, more in zip(rows, above, strict=True)]


def _curves(results: Results, grouped: Sequence[Group], folder: Path) -> "Figure | None":
    """Plot the losses during tuning, with a panel for each data set; None if there are no logs."""
    from matplotlib.ticker import MaxNLocator

    drawn: dict[str, dict[str, Mapping[str, list[tuple[int, float]]]]] = {}
    short = names(grouped)
    for group in grouped:
        file = curve_file(group.points[0], folder)
        curve = read_curve(file) if file is not None and file.exists() else {}
        if curve.get("step"):
            drawn.setdefault(group.dataset, {})[short[group.words[1:]]] = curve
    if not drawn:
        return None
    figure, all_axes = panels(len(drawn), 5.4, 3.4, most=2)
    looks = {name: (_LINES[i % len(_LINES)], _DASHES[i // len(_LINES) % 4]) for i, name in enumerate(short.values())}
    seen: dict[str, Any] = {}
    for axes, (dataset, curves) in zip(all_axes, drawn.items(), strict=True):
        for name, points in curves.items():
            seen[name] = _one_curve(axes, points, *looks[name])
        axes.set_title(dataset)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(f"loss, nats per {'picture' if results.primary == 'accuracy' else 'labelled token'}")
    columns = 2 if len(drawn) == 1 else 4
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def _one_curve(axes: "Axes", curve: Mapping[str, list[tuple[int, float]]], colour: str, dash: str) -> Any:
    """Draw the losses of one tuning: each step, their running mean, and the held-out losses; returns the mean's line.

    Args:
        axes: the panel.
        curve: the (step, loss) pairs, from `read_curve`.
        colour: the colour of the lines.
        dash: the line style of the running mean.
    """
    steps, losses = zip(*curve["step"], strict=True)
    axes.plot(steps, losses, color=colour, linewidth=0.6, alpha=0.3)
    (line,) = axes.plot(steps, _running_mean(losses), color=colour, linestyle=dash, linewidth=1.7)
    if curve.get("validation"):
        at, held_out = zip(*curve["validation"], strict=True)
        axes.scatter(at, held_out, color=colour, marker="D", s=18, zorder=3)
    return line


def read_curve(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the (step, loss) pairs in the log of a tuning run, for the events "step" and "validation".

    If a resumed run repeated a step, its last loss is returned.
    """
    found: dict[str, dict[int, float]] = {"step": {}, "validation": {}}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that an interruption cut
        if record.get("event") == "start":
            found = {"step": {}, "validation": {}}
        elif record.get("event") in found:
            found[record["event"]][int(record["step"])] = float(record["loss"])
    return {event: sorted(points.items()) for event, points in found.items()}


def _running_mean(losses: Sequence[float]) -> list[float]:
    """The mean of the losses in a window around each step, of a tenth of the run; the window is shorter at the ends."""
    half = max(1, len(losses) // 20)
    means = []
    for i in range(len(losses)):
        around = losses[max(0, i - half) : i + half + 1]
        means.append(sum(around) / len(around))
    return means
