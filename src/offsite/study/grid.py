"""The cells of a study: compressor x method x data set x seed, each with the stages whose scores are its rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from offsite.config import PackSpec, TuneSpec
from offsite.evaluation.row_scores import Measure
from offsite.model_owner.base_model import open_base
from offsite.model_owner.split import split
from offsite.protocol.artifacts import Base
from offsite.study.recipe import Compressor, DataTable, Method, Recipe, RowName
from offsite.study.stages import Lab, Rows, Stage, uncompressed


@dataclass(frozen=True)
class Cell:
    """One point of the grid, and where its figures come from."""

    dataset: DataTable
    data: Rows
    compressor: Compressor
    method: Method
    seed: int
    rows: Mapping[RowName, Stage]  # the scores that were asked for, in the house order
    pack: Stage
    tune: Stage
    protocol: tuple[Stage, ...]  # what both parties did between base and plug-in

    @property
    def primary(self) -> Measure:
        """What its models are compared by."""
        return "accuracy" if self.data.pictures else "loss"


def cells_of(recipe: Recipe, lab: Lab, rows: Mapping[str, Rows]) -> list[Cell]:
    """The whole grid, data set by data set; nothing runs.

    Args:
        recipe: what is wanted.
        lab: where it is done.
        rows: the data sets by name, as they lie with the data owner.
    """
    model = open_base(Base(lab.base))

    def middle(spec: PackSpec) -> int:
        return len(split(model, uncompressed(spec, 1)).middle)

    return [
        _cell(recipe, lab, rows[dataset.name], dataset, compressor, method, seed, middle(compressor.spec))
        for dataset in recipe.data
        for compressor in recipe.compressors
        for method in recipe.methods
        for seed in recipe.seeds
    ]


def _cell(
    recipe: Recipe,
    lab: Lab,
    rows: Rows,
    dataset: DataTable,
    compressor: Compressor,
    method: Method,
    seed: int,
    middle: int,
) -> Cell:
    here = method.on(dataset)
    spec, full = (one.changed({"seed": seed}) for one in (here.spec, here.full))
    pack = lab.pack(compressor.spec)
    protocol = _protocol(lab, pack, spec, rows)
    bundle, tune, plugged = protocol[1], protocol[2], protocol[-1]

    def score(row: RowName) -> Stage:
        if row == "zero_shot":
            return lab.score(rows, row)
        if row == "emulator_zero_shot":
            return lab.score(rows, row, bundle)
        if row == "full":
            return lab.score(rows, row, lab.full(full, rows))
        if row == "emulator":
            return lab.score(rows, row, bundle, tune)
        if row == "plug_in":
            return lab.score(rows, row, adapter=plugged)
        bound = _protocol(lab, lab.pack(uncompressed(compressor.spec, middle)), spec, rows)
        return lab.score(rows, row, adapter=bound[-1])

    scores = {row: score(row) for row in recipe.rows}
    return Cell(dataset, rows, compressor, method, seed, scores, pack, tune, protocol)


def _protocol(lab: Lab, pack: Stage, spec: TuneSpec, rows: Rows) -> tuple[Stage, ...]:
    """Pack, verify, tune, verify, plug in."""

    def stages() -> Iterator[Stage]:
        yield pack
        yield (bundle := lab.received(pack))
        yield (tune := lab.tune(bundle, spec, rows))
        yield (returned := lab.returned(tune))
        yield lab.plugged_in(returned)

    return tuple(stages())
