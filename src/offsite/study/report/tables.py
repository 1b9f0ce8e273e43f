"""The tables of a report: results in rows and columns of text, for Markdown and HTML alike."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from offsite.study.chain import OWNER, TUNER
from offsite.study.metric import PRIMARIES, Primary
from offsite.study.report.results import CellResult, Figure, Results

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
    """A table with a title and a line on how to read it; the first `keys` columns are words, the others numbers."""

    title: str
    note: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    keys: int


@dataclass(frozen=True)
class Group:
    """The cells of a study that differ in their seed alone."""

    dataset: str
    compress: str
    placement: str
    tune: str
    cells: tuple[CellResult, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The first columns of a table."""
        return self.dataset, self.compress, self.placement, self.tune

    def values(self, of: Callable[[CellResult], float | None]) -> list[float]:
        """A number of each cell that has it."""
        return [value for cell in self.cells if (value := of(cell)) is not None]

    def mean(self, of: Callable[[CellResult], float | None]) -> float | None:
        """The mean over seeds."""
        found = self.values(of)
        return statistics.fmean(found) if found else None


def groups(results: Results) -> list[Group]:
    """Cells by everything but the seed, in the study's order."""
    found: dict[tuple[str, str, str, str], list[CellResult]] = {}
    for cell in results.cells:
        found.setdefault((cell.dataset, cell.compress, cell.placement or "", cell.tune), []).append(cell)
    return [Group(*key, tuple(cells)) for key, cells in found.items()]


def names(grouped: Sequence[Group]) -> dict[tuple[str, ...], str]:
    """A short name for each group, by all its words but the data set: what differs in this study, and no more."""
    keys = list(dict.fromkeys(group.words[1:] for group in grouped))
    compress, placements, tunes = ({key[i] for key in keys} for i in range(3))
    apart = len({key[:2] for key in keys}) > len(compress)  # a compressor at several placements
    wanted = (len(compress) > 1, apart and len(placements) > 1, len(tunes) > 1)
    return {
        key: ", ".join(part for part, differs in zip(key, wanted, strict=True) if differs) or key[0] for key in keys
    }


def tables(results: Results) -> list[Table]:
    """Every table of a report that has something to show."""
    grouped, primary = groups(results), PRIMARIES[results.primary]
    beside = _picture_losses if results.primary == "accuracy" else _accuracies
    made = [_primary(results, grouped), _recovered(grouped, primary), beside(results, grouped), _costs(grouped)]
    return [table for table in made if table is not None and table.lines]


def failures(results: Results) -> list[str]:
    """What failed, a line each."""
    return [
        f"{cell.dataset}, {cell.compress}, {cell.placement or '?'}, {cell.tune}, seed {cell.seed}: "
        f"{LABELS[row]}: {error}"
        for cell in results.cells
        for row, error in cell.errors.items()
    ]


def score_of(row: str) -> Callable[[CellResult], float | None]:
    """A function from a cell to the primary score of one of its rows."""
    return lambda cell: cell.scores[row].primary.value if row in cell.scores else None


def _primary(results: Results, grouped: Sequence[Group]) -> Table:
    primary = PRIMARIES[results.primary]
    if results.primary == "accuracy":
        note = "Per cent of the test pictures told right; higher is better. Zero-shot rows are linear probes of frozen "
        note += "features, fitted on the training pictures. Behind ±: the standard error over test pictures"
    else:
        note = "Nats per labelled token on the test rows; lower is better. Behind ±: half the width of the 95 % "
        note += "interval over test rows"
    note += f"{', or the standard deviation over seeds where these differ' if _seeds(grouped) > 1 else ''}."
    lines = [(*group.words, *(_score(group, row, primary) for row in results.rows)) for group in grouped]
    return Table(primary.title, note, (*_KEYS, *(LABELS[row] for row in results.rows)), tuple(lines), len(_KEYS))


def _score(group: Group, row: str, primary: Primary) -> str:
    mean = group.mean(score_of(row))
    if mean is None:
        return "failed" if any(row in cell.errors for cell in group.cells) else ""
    values = group.values(score_of(row))
    if len(set(values)) > 1:
        return f"{primary.shown(mean)} ± {primary.shown(statistics.stdev(values))}"
    found = next(cell.scores[row] for cell in group.cells if row in cell.scores)
    off = found.accuracy_stderr if primary.name == "accuracy" else _half(found.primary)
    return primary.shown(mean) + ("" if off is None else f" ± {primary.shown(off)}")


def _half(figure: Figure) -> float | None:
    return None if figure.low is None or figure.high is None else (figure.high - figure.low) / 2


def _picture_losses(results: Results, grouped: Sequence[Group]) -> Table:
    def loss(group: Group, row: str) -> str:
        mean = group.mean(lambda cell: cell.scores[row].loss.value if row in cell.scores else None)
        return "" if mean is None else f"{mean:.3f}"

    note = "Nats per test picture; lower is better."
    lines = [(*group.words, *(loss(group, row) for row in results.rows)) for group in grouped]
    return Table("Held-out loss", note, (*_KEYS, *(LABELS[row] for row in results.rows)), tuple(lines), len(_KEYS))


def _recovered(grouped: Sequence[Group], primary: Primary) -> Table:
    head = (
        *_KEYS, f"plug-in against zero-shot, {primary.difference}", "gain recovered, %", "bound recovered, %",
        f"plug-in gap, {primary.difference}", "bundle, MiB",
    )  # fmt: skip
    lines = [
        (
            *group.words,
            _with_ends(group, _against_zero_shot, primary.signed),
            _percent(group, lambda cell: cell.gain_recovered),
            _percent(group, lambda cell: cell.bound_recovered),
            _with_ends(group, lambda cell: cell.plug_in_gap, primary.signed),
            _mebibytes(group.mean(lambda cell: cell.bundle_bytes)),
        )
        for group in grouped
    ]
    note = (
        "Gain recovered is the share of full fine-tuning's gain over zero-shot that the plug-in has, bound recovered "
        "the share of what the same adapter gains on the uncompressed base; the plug-in gap is plug-in minus emulator, "
        f"and {'above' if primary.higher_is_better else 'below'} 0 where the data owner does not have what the model's "
        "owner gets. In brackets: 95 % intervals over the same drawn test rows for every model"
        + (" (of several seeds: the standard deviation)." if _seeds(grouped) > 1 else ".")
    )
    return Table("What the plug-in recovers", note, head, tuple(lines), len(_KEYS))


def _against_zero_shot(cell: CellResult) -> Figure | None:
    return cell.scores["plug_in"].against_zero_shot if "plug_in" in cell.scores else None


def _percent(group: Group, of: Callable[[CellResult], Figure | None]) -> str:
    return _with_ends(group, of, lambda value: f"{100 * value:.0f}")


def _with_ends(group: Group, of: Callable[[CellResult], Figure | None], shown: Callable[[float], str]) -> str:
    figures = [figure for cell in group.cells if (figure := of(cell)) is not None]
    if not figures:
        return ""
    values = [figure.value for figure in figures]
    text = shown(statistics.fmean(values))
    if len(group.cells) > 1:
        return text + (f" ± {shown(statistics.stdev(values)).lstrip('+')}" if len(values) > 1 else "")
    low, high = figures[0].low, figures[0].high
    return text if low is None or high is None else f"{text} [{shown(low)}, {shown(high)}]"


def _accuracies(results: Results, grouped: Sequence[Group]) -> Table | None:
    asked = [group for group in grouped if group.cells[0].score != "loss"]
    lines = [(*group.words, *(_accuracy(group, row) for row in results.rows)) for group in asked]
    note = "Per cent of the questions whose right choice is the likeliest; behind ± the standard error over questions."
    head = (*_KEYS, *(LABELS[row] for row in results.rows))
    return Table("Accuracy", note, head, tuple(lines), len(_KEYS)) if lines else None


def _accuracy(group: Group, row: str) -> str:
    name = group.cells[0].score
    mean = group.mean(lambda cell: getattr(cell.scores[row], name) if row in cell.scores else None)
    error = group.mean(lambda cell: getattr(cell.scores[row], f"{name}_stderr") if row in cell.scores else None)
    return "" if mean is None else f"{100 * mean:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _costs(grouped: Sequence[Group]) -> Table:
    head = (
        *_KEYS, "bundle, MiB", "return, MiB", "model's owner, s", "data owner, s", "model's owner, peak MiB",
        "data owner, peak MiB",
    )  # fmt: skip
    lines = []
    for group in grouped:
        sizes = (group.mean(lambda cell: cell.bundle_bytes), group.mean(lambda cell: cell.return_bytes))
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
    return group.mean(lambda cell: getattr(cell, name).get(party) or None)


def _mebibytes(size: float | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f}"


def _seeds(grouped: Sequence[Group]) -> int:
    return max((len(group.cells) for group in grouped), default=0)


def curve_file(cell: CellResult, folder: Path) -> Path | None:
    """Where the log of a cell's tuning lies."""
    return folder / cell.log if cell.log else None
