"""The tables of a report as rows and columns of text, for Markdown and HTML."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from offsite.study.metric import METRICS, Metric
from offsite.study.report.results import Figure, GridPointResult, Results
from offsite.study.resumable_chain import OWNER, TUNER

LABELS = {
    "zero_shot": "zero-shot",
    "emulator_zero_shot": "emulator zero-shot",
    "full": "full fine-tuning",
    "adapter_on_base": "adapter on base",
    "emulator": "emulator",
    "plug_in": "plug-in",
}
_KEYS = ("data set", "compress", "placement", "tuning")


@dataclass(frozen=True)
class Table:
    """A table of the report; `note` says how to read it. The first `keys` columns hold words, the others numbers."""

    title: str
    note: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    keys: int


@dataclass(frozen=True)
class Group:
    """Grid points that differ only in their seed, with the settings that they have in common."""

    dataset: str
    compress: str
    placement: str
    tune: str
    points: tuple[GridPointResult, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The cells of this group in the first columns of a table: data set, compressor, placement, tuning."""
        return self.dataset, self.compress, self.placement, self.tune

    def values(self, of: Callable[[GridPointResult], float | None]) -> list[float]:
        """The results of the function `of` for the grid points (one for each seed), without None."""
        return [value for point in self.points if (value := of(point)) is not None]

    def mean(self, of: Callable[[GridPointResult], float | None]) -> float | None:
        """The mean over seeds of the function `of`; None if it is None for every grid point."""
        found = self.values(of)
        return statistics.fmean(found) if found else None


def groups(results: Results) -> list[Group]:
    """Put grid points that differ only in their seed into one group; groups are in the study's order."""
    found: dict[tuple[str, str, str, str], list[GridPointResult]] = {}
    for point in results.cells:
        found.setdefault((point.dataset, point.compress, point.placement or "", point.tune), []).append(point)
    return [Group(*key, tuple(points)) for key, points in found.items()]


def names(grouped: Sequence[Group]) -> dict[tuple[str, ...], str]:
    """A short name for each group, made of the settings that differ in this study.

    The keys are `Group.words` without the data set.
    """
    keys = list(dict.fromkeys(group.words[1:] for group in grouped))
    compress, placements, tunes = ({key[i] for key in keys} for i in range(3))
    apart = len({key[:2] for key in keys}) > len(compress)  # a compressor at several placements
    wanted = (len(compress) > 1, apart and len(placements) > 1, len(tunes) > 1)
    return {
        key: ", ".join(part for part, differs in zip(key, wanted, strict=True) if differs) or key[0] for key in keys
    }


def tables(results: Results) -> list[Table]:
    """Make the tables of a report; a table without lines is left out."""
    grouped, metric = groups(results), METRICS[results.primary]
    others = _picture_losses if results.primary == "accuracy" else _accuracies
    made = [_main_scores(results, grouped), _recovered(grouped, metric), others(results, grouped), _costs(grouped)]
    return [table for table in made if table is not None and table.lines]


def failures(results: Results) -> list[str]:
    """A line of text for each score that failed: its grid point, its row of the result table, and its error."""
    return [
        f"{point.dataset}, {point.compress}, {point.placement or '?'}, {point.tune}, seed {point.seed}: "
        f"{LABELS[row]}: {error}"
        for point in results.cells
        for row, error in point.errors.items()
    ]


def score_of(row: str) -> Callable[[GridPointResult], float | None]:
    """Make a function that returns the primary score of one model of a grid point, or None if it has no score.

    Primary scores are held-out losses, or accuracies for pictures. `row` is the model's row of the result table, such
    as "plug_in".
    """
    return lambda point: point.scores[row].primary.value if row in point.scores else None


def _main_scores(results: Results, grouped: Sequence[Group]) -> Table:
    """The table of held-out losses (for pictures, accuracies): a line for each group, a column for each model."""
    metric = METRICS[results.primary]
    if results.primary == "accuracy":
        note = "Per cent of test pictures classified correctly; higher is better. Zero-shot rows are linear probes of "
        note += "frozen features, fitted on the training pictures. Behind ±: the standard error over test pictures"
    else:
        note = "Nats per labelled token on the test rows; lower is better. Behind ±: half the width of the 95 % "
        note += "interval over test rows"
    note += f"{', or the standard deviation over seeds where these differ' if _seeds(grouped) > 1 else ''}."
    lines = [(*group.words, *(_score(group, row, metric) for row in results.rows)) for group in grouped]
    return Table(metric.title, note, (*_KEYS, *(LABELS[row] for row in results.rows)), tuple(lines), len(_KEYS))


def _score(group: Group, row: str, metric: Metric) -> str:
    """A cell of the table of losses or accuracies: the mean over seeds, and its standard deviation or error.

    `row` is the model's row of the result table, such as "plug_in".
    """
    mean = group.mean(score_of(row))
    if mean is None:
        return "failed" if any(row in point.errors for point in group.points) else ""
    values = group.values(score_of(row))
    if len(set(values)) > 1:
        return f"{metric.format(mean)} ± {metric.format(statistics.stdev(values))}"
    found = next(point.scores[row] for point in group.points if row in point.scores)
    off = found.accuracy_stderr if metric.name == "accuracy" else _half(found.primary)
    return metric.format(mean) + ("" if off is None else f" ± {metric.format(off)}")


def _half(figure: Figure) -> float | None:
    """Half the width of a figure's interval; None if it has none."""
    return None if figure.low is None or figure.high is None else (figure.high - figure.low) / 2


def _picture_losses(results: Results, grouped: Sequence[Group]) -> Table:
    """The table of held-out losses, in nats per picture."""

    def loss(group: Group, row: str) -> str:
        mean = group.mean(lambda point: point.scores[row].loss.value if row in point.scores else None)
        return "" if mean is None else f"{mean:.3f}"

    note = "Nats per test picture; lower is better."
    lines = [(*group.words, *(loss(group, row) for row in results.rows)) for group in grouped]
    return Table("Held-out loss", note, (*_KEYS, *(LABELS[row] for row in results.rows)), tuple(lines), len(_KEYS))


def _recovered(grouped: Sequence[Group], metric: Metric) -> Table:
    """The table of the plug-in's gain, compared with full fine-tuning and with the emulator."""
    head = (
        *_KEYS, f"plug-in against zero-shot, {metric.difference}", f"emulator against zero-shot, {metric.difference}",
        "gain recovered, %", "emulator's own gain, %", "arithmetic, %", "base sent verbatim, %",
        "bound recovered, %",
        f"plug-in gap, {metric.difference}", "bundle, MiB",
    )  # fmt: skip
    lines = [
        (
            *group.words,
            _with_ends(group, _against_zero_shot("plug_in"), metric.format_difference),
            _with_ends(group, _against_zero_shot("emulator"), metric.format_difference),
            _percent(group, lambda point: point.gain_recovered),
            _percent(group, lambda point: point.own_gain),
            "" if (share := group.mean(lambda point: point.arithmetic)) is None else f"{100 * share:.0f}",
            "" if (share := group.mean(verbatim_share)) is None else f"{100 * share:.1f}",
            _percent(group, lambda point: point.bound_recovered),
            _with_ends(group, lambda point: point.plug_in_gap, metric.format_difference),
            _mebibytes(group.mean(lambda point: point.bundle_bytes)),
        )
        for group in grouped
    ]
    note = (
        "Gain recovered is the share of full fine-tuning's gain over zero-shot that the plug-in has. Emulator's own "
        "gain is the share that the tuned emulator has by itself: the data owner has it without the model's owner. "
        "Arithmetic is calculated: the multiply-adds of frozen linear layers in a training step, as a share of those "
        "of LoRA on every block of the base. Base sent verbatim is the share of the base's parameters whose values are "
        "in the bundle unchanged. "
        "Bound recovered is the plug-in's share of what the same adapter gains on the uncompressed base. The plug-in "
        f"gap is plug-in minus emulator, {'above' if metric.higher_is_better else 'below'} 0 if the plug-in is better. "
        "In brackets: 95 % intervals over the same drawn test rows for every model"
        + (" (of several seeds: the standard deviation)." if _seeds(grouped) > 1 else ".")
    )
    return Table("What the plug-in recovers", note, head, tuple(lines), len(_KEYS))


def verbatim_share(point: GridPointResult) -> float | None:
    """The share of the base's parameters that are in the grid point's bundle unchanged; None if it is not known."""
    return point.base_parameters["verbatim"] if point.base_parameters else None


def _against_zero_shot(row: str) -> Callable[[GridPointResult], Figure | None]:
    """Make a function that returns a model's score minus the zero-shot score; None if it has not been computed.

    `row` is the model's row of the result table, such as "plug_in".
    """
    return lambda point: point.scores[row].against_zero_shot if row in point.scores else None


def _percent(group: Group, of: Callable[[GridPointResult], Figure | None]) -> str:
    """The mean over seeds of the function `of` in per cent, with its interval, as text."""
    return _with_ends(group, of, lambda value: f"{100 * value:.0f}")


def _with_ends(group: Group, of: Callable[[GridPointResult], Figure | None], shown: Callable[[float], str]) -> str:
    """The mean over seeds of the function `of`, with its interval or standard deviation, as text.

    `shown` formats a value.
    """
    figures = [figure for point in group.points if (figure := of(point)) is not None]
    if not figures:
        return ""
    values = [figure.value for figure in figures]
    text = shown(statistics.fmean(values))
    if len(group.points) > 1:
        return text + (f" ± {shown(statistics.stdev(values)).lstrip('+')}" if len(values) > 1 else "")
    low, high = figures[0].low, figures[0].high
    return text if low is None or high is None else f"{text} [{shown(low)}, {shown(high)}]"


def _accuracies(results: Results, grouped: Sequence[Group]) -> Table | None:
    """The table of accuracies on multiple-choice rows; None if no group has them."""
    asked = [group for group in grouped if group.points[0].score != "loss"]
    lines = [(*group.words, *(_accuracy(group, row) for row in results.rows)) for group in asked]
    note = "Per cent of the questions whose right choice is the likeliest; behind ± the standard error over questions."
    head = (*_KEYS, *(LABELS[row] for row in results.rows))
    return Table("Accuracy", note, head, tuple(lines), len(_KEYS)) if lines else None


def _accuracy(group: Group, row: str) -> str:
    """A cell of the table of accuracies: the mean over seeds, and its standard error, in per cent.

    `row` is the model's row of the result table, such as "plug_in".
    """
    name = group.points[0].score
    mean = group.mean(lambda point: getattr(point.scores[row], name) if row in point.scores else None)
    error = group.mean(lambda point: getattr(point.scores[row], f"{name}_stderr") if row in point.scores else None)
    return "" if mean is None else f"{100 * mean:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _costs(grouped: Sequence[Group]) -> Table:
    """The table of each party's time, memory and sizes of files."""
    head = (
        *_KEYS, "bundle, MiB", "return, MiB", "model's owner, s", "data owner, s", "model's owner, peak MiB",
        "data owner, peak MiB",
    )  # fmt: skip
    lines = []
    for group in grouped:
        sizes = (group.mean(lambda point: point.bundle_bytes), group.mean(lambda point: point.return_bytes))
        seconds = [_mean_of(group, "seconds", party) for party in (OWNER, TUNER)]
        peaks = [_mean_of(group, "peak_bytes", party) for party in (OWNER, TUNER)]
        cells = [*map(_mebibytes, sizes), *("" if s is None else f"{s:.0f}" for s in seconds), *map(_mebibytes, peaks)]
        lines.append((*group.words, *cells))
    note = (
        "Wall time and the largest resident memory of each party's own processes, as the operating system says; a "
        "bundle that several cells share is packed once, and its seconds stand in each."
    )
    return Table("What it costs", note, head, tuple(lines), len(_KEYS))


def _mean_of(group: Group, name: str, party: str) -> float | None:
    """The mean over seeds of a party's time or memory; `name` is "seconds" or "peak_bytes". None if not measured."""
    return group.mean(lambda point: getattr(point, name).get(party) or None)


def _mebibytes(size: float | None) -> str:
    """A size in bytes as text in MiB; empty for None."""
    return "" if size is None else f"{size / 2**20:,.1f}"


def _seeds(grouped: Sequence[Group]) -> int:
    """The largest number of seeds of a group."""
    return max((len(group.points) for group in grouped), default=0)


def curve_file(point: GridPointResult, folder: Path) -> Path | None:
    """The path of the log of a grid point's tuning run; None if there is no log."""
    return folder / point.log if point.log else None
