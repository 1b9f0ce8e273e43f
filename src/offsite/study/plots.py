"""The plots of a report, as PNG files (the extra `study`). Colours: Okabe and Ito's, for the colour-blind too."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite.core.extras import require
from offsite.study.results import Results
from offsite.study.tables import LABELS, Group, curve_file, groups, loss_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "zero_shot": "#7f7f7f",
    "emulator_zero_shot": "#c8c8c8",
    "full": "#000000",
    "adapter_on_base": "#cc79a7",
    "emulator": "#e69f00",
    "plug_in": "#0072b2",
}
_LINES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#8c8c8c")
_DASHES = ("-", "--", ":", "-.")
_PANELS = 24  # of one file
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
    """A plot: its file, a title, and what it shows in words."""

    file: Path
    title: str
    says: str


def require_matplotlib() -> Any:
    """The package that draws.

    Raises:
        UsageError: it is not installed.
    """
    return require("matplotlib", "study", "drawing the plots of a study")


def draw(results: Results, folder: Path) -> list[Plot]:
    """Draw every plot that there is something for.

    Args:
        results: of the study.
        folder: the study's; plots go to its `plots/`.

    Raises:
        UsageError: matplotlib is not installed.
    """
    matplotlib = require_matplotlib()
    made = []
    with matplotlib.rc_context(_STYLE):
        for name, title, says, figure in _figures(results, folder):
            if figure is None:
                continue
            file = folder / "plots" / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file)
            made.append(Plot(file, title, says))
    return made


def _figures(results: Results, folder: Path) -> list[tuple[str, str, str, "Figure | None"]]:
    grouped = groups(results)
    return [
        (
            "rows",
            "Every row in the house order",
            "Held-out loss of each model; the dashed line is zero-shot, whiskers are 95 % intervals over test rows.",
            _bars(results, grouped),
        ),
        (
            "frontier",
            "Bundle size against loss",
            "What the model's owner gets (plug-in) and what the data owner has (emulator, tuned) by the bundle's size.",
            _frontier(grouped),
        ),
        (
            "curves",
            "Training curves",
            "Loss on the emulator (faint: single steps; strong: their running mean); diamonds: held-out rows.",
            _curves(grouped, folder),
        ),
    ]


def _panels(count: int, width: float, height: float, most: int = 3) -> "tuple[Figure, list[Axes]]":
    """A figure of so many panels of that size in inches, and no empty ones."""
    from matplotlib.figure import Figure

    columns = min(most, count)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = [figure.add_subplot(lines, columns, i + 1) for i in range(count)]
    return figure, axes


def _bars(results: Results, grouped: Sequence[Group]) -> "Figure | None":
    shown = [group for group in grouped if any(cell.scores for cell in group.cells)][:_PANELS]
    if not shown:
        return None
    figure, panels = _panels(len(shown), 4.4, 0.75 + 0.27 * len(results.rows))
    for axes, group in zip(panels, shown, strict=True):
        rows = [row for row in results.rows if group.mean(loss_of(row)) is not None]
        means = [group.mean(loss_of(row)) or 0.0 for row in rows]
        places = range(len(rows))
        axes.barh(
            places,
            means,
            color=[COLOURS[row] for row in rows],
            height=0.72,
            xerr=_whiskers(group, rows),
            ecolor="#555555",
        )
        for place, mean, end in zip(places, means, _ends(group, rows), strict=True):
            axes.annotate(f"{mean:.3f}", (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(places, [LABELS[row] for row in rows])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, max(_ends(group, rows)) * 1.18)
        axes.set_title(_title(group), fontsize=9)
        if "zero_shot" in rows:
            axes.axvline(means[rows.index("zero_shot")], color="#555555", linestyle="--", linewidth=0.9)
        axes.set_xlabel("held-out loss, nats per labelled token")
    return figure


def _title(group: Group) -> str:
    from textwrap import fill

    return f"{group.dataset}\n{fill(group.name, 48)}"


def _whiskers(group: Group, rows: Sequence[str]) -> Any:
    """Below and above each bar: the interval of a single seed, else how far seeds lie apart."""
    ends = []
    for row in rows:
        values = group.values(loss_of(row))
        figure = group.cells[0].scores[row].loss if row in group.cells[0].scores else None
        mean = sum(values) / len(values)
        if len(values) > 1:
            ends.append((mean - min(values), max(values) - mean))
        elif figure is not None and figure.low is not None and figure.high is not None:
            ends.append((mean - figure.low, figure.high - mean))
        else:
            ends.append((0.0, 0.0))
    return [[low for low, _ in ends], [high for _, high in ends]]


def _ends(group: Group, rows: Sequence[str]) -> list[float]:
    above = _whiskers(group, rows)[1]
    return [(group.mean(loss_of(row)) or 0.0) + more for row, more in zip(rows, above, strict=True)]


def _frontier(grouped: Sequence[Group]) -> "Figure | None":
    """A panel for each data set and tuning: the plug-in's and the emulator's loss over the bundle's size."""
    sized = [
        group for group in grouped if group.mean(lambda cell: cell.bundle_bytes) and group.mean(loss_of("plug_in"))
    ]
    panels: dict[tuple[str, str], list[Group]] = {}
    for group in sized:
        panels.setdefault((group.dataset, group.tune), []).append(group)
    shown = {key: found for key, found in panels.items() if len(found) > 1}
    if not shown:
        return None
    figure, all_axes = _panels(len(shown), 4.6, 3.6)
    for axes, ((dataset, tune), found) in zip(all_axes, shown.items(), strict=True):
        _one_frontier(axes, found)
        axes.set_title(f"{dataset}, {tune}")
    all_axes[0].legend(loc="best", fontsize=8)
    return figure


def _one_frontier(axes: "Axes", found: Sequence[Group]) -> None:
    by_size = sorted(found, key=lambda group: group.mean(lambda cell: cell.bundle_bytes) or 0.0)
    sizes = [(group.mean(lambda cell: cell.bundle_bytes) or 0.0) / 2**20 for group in by_size]
    for row, marker in (("emulator", "s"), ("plug_in", "o")):
        points = [
            (x, y) for x, group in zip(sizes, by_size, strict=True) if (y := group.mean(loss_of(row))) is not None
        ]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.scatter(xs, ys, color=COLOURS[row], marker=marker, s=34, label=LABELS[row], zorder=3)
    for x, group in zip(sizes, by_size, strict=True):
        low, high = group.mean(loss_of("plug_in")), group.mean(loss_of("emulator"))
        if low is not None and high is not None:  # one bundle: what each side has of it
            axes.plot([x, x], [low, high], color="#c8c8c8", linewidth=1, zorder=1)
    for row, style in (("zero_shot", "--"), ("full", ":")):
        level = found[0].mean(loss_of(row))
        if level is not None:
            axes.axhline(level, color=COLOURS[row], linestyle=style, linewidth=1, label=LABELS[row])
    _name_points(axes, sizes, by_size)
    axes.margins(x=0.16, y=0.14)
    axes.set_xlabel("bundle, MiB")
    axes.set_ylabel("held-out loss, nats per labelled token")


def _name_points(axes: "Axes", sizes: Sequence[float], by_size: Sequence[Group]) -> None:
    """Each plug-in's name below it; neighbours of about the same size at different heights."""
    near = (max(sizes) - min(sizes)) * 0.12
    level = 0
    for i, (x, group) in enumerate(zip(sizes, by_size, strict=True)):
        level = level + 1 if i and x - sizes[i - 1] < near else 0
        name = ", ".join(part for part in (group.compress, group.placement) if part)
        axes.annotate(
            name, (x, group.mean(loss_of("plug_in")) or 0.0), (0, -12 - 9 * (level % 4)), textcoords="offset points",
            ha="center", fontsize=7,
        )  # fmt: skip


def _curves(grouped: Sequence[Group], folder: Path) -> "Figure | None":
    drawn: dict[str, list[tuple[str, Mapping[str, list[tuple[int, float]]]]]] = {}
    for group in grouped:
        file = curve_file(group.cells[0], folder)
        curve: Mapping[str, list[tuple[int, float]]] = read_curve(file) if file is not None and file.exists() else {}
        if curve.get("step"):
            drawn.setdefault(group.dataset, []).append((group.name, curve))
    if not drawn:
        return None
    figure, panels = _panels(len(drawn), 5.2, 3.6, most=2)
    for axes, (dataset, curves) in zip(panels, drawn.items(), strict=True):
        for i, (name, curve) in enumerate(curves):
            colour, dash = _LINES[i % len(_LINES)], _DASHES[i // len(_LINES) % len(_DASHES)]
            steps, losses = zip(*curve["step"], strict=True)
            axes.plot(steps, losses, color=colour, linewidth=0.6, alpha=0.25)
            axes.plot(steps, _running_mean(losses), color=colour, linestyle=dash, linewidth=1.6, label=name)
            if curve.get("validation"):
                steps, losses = zip(*curve["validation"], strict=True)
                axes.scatter(steps, losses, color=colour, marker="D", s=18, zorder=3)
        axes.set_title(dataset)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("loss, nats per labelled token")
        axes.legend(fontsize=7, loc="upper right")
    return figure


def read_curve(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and losses of a tuning's log, by event; what a resumed run did again counts once, as it was last."""
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
    """The mean of a tenth of the run around each step; shorter at the ends."""
    half = max(1, len(losses) // 20)
    means = []
    for i in range(len(losses)):
        around = losses[max(0, i - half) : i + half + 1]
        means.append(sum(around) / len(around))
    return means
