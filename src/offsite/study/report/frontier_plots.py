"""Plots of what the model owner gets and what the data owner has: against each other, and by the bundle's size."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from offsite.study.metric import Metric
from offsite.study.report import results
from offsite.study.report.panels import COLOURS, panels
from offsite.study.report.report_tables import LABELS, Group, names, score_of, verbatim_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Point(NamedTuple):
    """A point of a plot, with its name."""

    x: float
    y: float
    name: str


def gains_frontier(grouped: Sequence[Group]) -> "Figure | None":
    """Plot the gain recovered against the emulator's own gain, both in per cent.

    There is a panel for each data set and tuning. If no panel would have two bundles, all data sets are in one.

    Returns None if there are not two groups with both gains.
    """
    known = [group for group in grouped if None not in (_gain(group, "plug_in"), _gain(group, "emulator"))]
    if len(known) < 2:
        return None
    short = names(known)
    shown = {", ".join(key): found for key, found in _by_data_and_tuning(known).items() if len(found) > 1}
    sets = list(dict.fromkeys(group.dataset for group in known))
    shown = shown or {sets[0] if len(sets) == 1 else "all data sets": known}
    figure, all_axes = panels(len(shown), 7.2, 4.2, most=2)
    for axes, (title, found) in zip(all_axes, shown.items(), strict=True):
        _one_gains(axes, found, [_gains(group, _name(group, found, short)) for group in found])
        axes.set_title(title)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _name(group: Group, panel: Sequence[Group], short: Mapping[tuple[str, ...], str]) -> str:
    """A group's name among those of its panel: its settings, or its data set, or both.

    `short` has short names of the settings, keyed by `Group.words` without the data set.
    """
    settings = short[group.words[1:]]
    if len({one.dataset for one in panel}) == 1:
        return settings
    return group.dataset if len(short) == 1 else f"{group.dataset}, {settings}"


def _gain(group: Group, row: str) -> float | None:
    """The mean over seeds of a model's gain, in per cent of full fine-tuning's; None if not known.

    `row` is "plug_in" or "emulator".
    """
    mean = group.mean(lambda point: None if (gain := _figure_of(point, row)) is None else gain.value)
    return None if mean is None else 100 * mean


def _figure_of(point: results.GridPointResult, row: str) -> results.Figure | None:
    """A model's gain as a share of full fine-tuning's; `row` is "plug_in" or "emulator". None if it is not known."""
    return point.gain_recovered if row == "plug_in" else point.own_gain


def _gains(group: Group, name: str) -> _Point:
    """The point of a group whose gains are known; behind its name stands the share that was sent verbatim."""
    share = group.mean(verbatim_share)
    label = name if share is None else f"{name} ({100 * share:.0f} % verbatim)"
    return _Point(_gain(group, "emulator") or 0.0, _gain(group, "plug_in") or 0.0, label)


def _one_gains(axes: "Axes", found: Sequence[Group], points: Sequence[_Point]) -> None:
    """Draw one panel: the gain recovered against the emulator's own gain, for the bundles of the groups `found`.

    `points` has the point of each group, in the same order.
    """
    for group, point in zip(found, points, strict=True):
        axes.errorbar(
            point.x, point.y, xerr=_whisker(group, "emulator"), yerr=_whisker(group, "plug_in"), ecolor="#c8c8c8",
            elinewidth=1, fmt="none", zorder=1,
        )  # fmt: skip
    xs, ys = [point.x for point in points], [point.y for point in points]
    axes.scatter(xs, ys, color=COLOURS["plug_in"], s=110, alpha=0.85, linewidths=0, label=LABELS["plug_in"], zorder=3)
    axes.axhline(100, color=COLOURS["full"], linestyle=":", linewidth=1.1, label=LABELS["full"], zorder=0)
    axes.margins(x=0.08, y=0.08)
    ends = (axes.get_xlim(), axes.get_ylim())
    line = (min(ends[0][0], ends[1][0]), max(ends[0][1], ends[1][1]))
    equal = "emulator as good as the plug-in"
    axes.plot(line, line, color=COLOURS["emulator"], linestyle="--", linewidth=1.1, label=equal, zorder=0)
    axes.set_xlim(*ends[0])
    axes.set_ylim(*ends[1])
    _number_points(axes, points)
    axes.set_xlabel("emulator's own gain, % of full fine-tuning's")
    axes.set_ylabel("gain recovered, % of full fine-tuning's")


def _number_points(axes: "Axes", points: Sequence[_Point]) -> None:
    """Write a number into each point, and the list of names with their numbers to the right of the panel."""
    lines = []
    for number, (x, y, name) in enumerate(sorted(points), start=1):
        axes.annotate(str(number), (x, y), ha="center", va="center", color="white", fontsize=7, zorder=4)
        lines.append(f"{number}  {name}")
    axes.text(1.02, 1.0, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=7.5, linespacing=1.5)


def _whisker(group: Group, row: str) -> list[list[float]] | None:
    """Lengths of the error bar below and above the gain of `row`, "plug_in" or "emulator", in per cent.

    None over several seeds, or without an interval.
    """
    figure = _figure_of(group.points[0], row)
    if len(group.points) > 1 or figure is None or figure.low is None or figure.high is None:
        return None
    return [[100 * (figure.value - figure.low)], [100 * (figure.high - figure.value)]]


def bundle_sizes(grouped: Sequence[Group], metric: Metric) -> "Figure | None":
    """Plot scores of plug-in and emulator against the bundle's size, with a panel for each data set and tuning.

    Returns None if no panel would have two bundles.
    """
    scored = [group for group in grouped if _size(group) and group.mean(score_of("plug_in")) is not None]
    shown = {key: sorted(found, key=_size) for key, found in _by_data_and_tuning(scored).items() if len(found) > 1}
    if not shown:
        return None
    figure, all_axes = panels(len(shown), 6.0, 4.2, most=2)
    for axes, ((dataset, tune), found) in zip(all_axes, shown.items(), strict=True):
        _one_size(axes, found, metric)
        axes.set_title(f"{dataset}, {tune}")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _size(group: Group) -> float:
    """The mean size of a group's bundles in MiB; 0 if it is unknown."""
    return (group.mean(lambda point: point.bundle_bytes) or 0.0) / 2**20


def _one_size(axes: "Axes", found: Sequence[Group], metric: Metric) -> None:
    """Draw one panel: the scores of plug-in and emulator against the bundle's size, for several bundles."""

    def height(group: Group, row: str) -> float | None:
        mean = group.mean(score_of(row))
        return None if mean is None else metric.scale * mean

    for group in found:  # a line between the two scores of one bundle
        one, other = height(group, "plug_in"), height(group, "emulator")
        if one is not None and other is not None:
            axes.plot([_size(group)] * 2, [one, other], color="#d0d0d0", linewidth=1, zorder=1)
    for row, marker in (("emulator", "s"), ("plug_in", "o")):
        points = [(_size(group), y) for group in found if (y := height(group, row)) is not None]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.scatter(xs, ys, color=COLOURS[row], marker=marker, s=36, label=LABELS[row], zorder=3)
    for row, style in (("zero_shot", "--"), ("full", ":")):
        level = height(found[0], row)
        if level is not None:
            axes.axhline(level, color=COLOURS[row], linestyle=style, linewidth=1.1, label=LABELS[row], zorder=0)
    axes.margins(x=0.08, y=0.08)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.22 * (high - low))  # room for the names
    short = names(found)
    _name_points(axes, [_Point(_size(one), height(one, "plug_in") or 0.0, short[one.words[1:]]) for one in found])
    axes.set_xlabel("bundle, MiB")
    axes.set_ylabel(metric.axis)


def _by_data_and_tuning(grouped: Sequence[Group]) -> dict[tuple[str, str], list[Group]]:
    """The groups of each data set and tuning, in their order."""
    found: dict[tuple[str, str], list[Group]] = {}
    for group in grouped:
        found.setdefault((group.dataset, group.tune), []).append(group)
    return found


def _name_points(axes: "Axes", points: Sequence[_Point]) -> None:
    """Write each name to the right of its point, and move names up that would overlap."""
    bottom, top = axes.get_ylim()
    left, right = axes.get_xlim()
    gap, near = 0.042 * (top - bottom), 0.2 * (right - left)
    placed: list[tuple[float, float]] = []
    for x, y, name in sorted(points, key=lambda point: point.y):
        at = y
        while any(abs(x - other) < near and abs(at - height) < gap for other, height in placed):
            at += gap / 4
        placed.append((x, at))
        axes.annotate(
            name, (x, y), (x + 0.022 * (right - left), at), va="center", fontsize=7.5, zorder=4,
            arrowprops={"arrowstyle": "-", "color": "#9a9a9a", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8},
        )  # fmt: skip
