"""The grid of a study: one point for each data set, compressor, method and seed, with the stages that it needs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from offsite.config import PackSpec, TuneSpec
from offsite.evaluation.row_scores import MetricName
from offsite.model_owner.base_model import open_base
from offsite.model_owner.partition import partition
from offsite.protocol.artifacts import Base
from offsite.study.recipe import Compressor, DataTable, Method, Recipe, RowName
from offsite.study.stages import Rows, Stage, Workspace, uncompressed_spec


@dataclass(frozen=True)
class GridPoint:
    """One combination of data set, compressor, method and seed in a study, with the stages that compute its scores."""

    dataset: DataTable
    data: Rows
    compressor: Compressor
    method: Method
    seed: int
    rows: Mapping[RowName, Stage]  # one scoring stage for each row of the result table, in the table's order
    pack: Stage
    tune: Stage
    protocol: tuple[Stage, ...]  # the stages of both parties from packing to plugging in, in order

    @property
    def metric(self) -> MetricName:
        """The metric by which the models of this grid point are compared."""
        return "accuracy" if self.data.pictures else "loss"


def expand_grid(recipe: Recipe, workspace: Workspace, rows: Mapping[str, Rows]) -> list[GridPoint]:
    """List every point of the grid, data set by data set. Nothing runs.

    Args:
        recipe: lists the data sets, compressors, methods and seeds.
        workspace: the study's folder and base model.
        rows: the files of each data set in the data owner's folder, by the data set's name.
    """
    model = open_base(Base(workspace.base))

    def middle(spec: PackSpec) -> int:
        return len(partition(model, uncompressed_spec(spec, 1)).middle)

    return [
        _grid_point(recipe, workspace, rows[dataset.name], dataset, compressor, method, seed, middle(compressor.spec))
        for dataset in recipe.data
        for compressor in recipe.compressors
        for method in recipe.methods
        for seed in recipe.seeds
    ]


def _grid_point(
    recipe: Recipe,
    workspace: Workspace,
    rows: Rows,
    dataset: DataTable,
    compressor: Compressor,
    method: Method,
    seed: int,
    middle: int,
) -> GridPoint:
    """Make a grid point, with a scoring stage for each model (row of the result table).

    `middle` is the number of the base's middle blocks, which a bundle without compression keeps.
    """
    method_on_dataset = method.on(dataset)
    spec, full = (one.changed({"seed": seed}) for one in (method_on_dataset.spec, method_on_dataset.full))
    pack = workspace.pack_stage(compressor.spec)
    protocol = _protocol(workspace, pack, spec, rows)
    bundle, tune, plugged = protocol[1], protocol[2], protocol[-1]

    def score(row: RowName) -> Stage:
        if row == "zero_shot":
            return workspace.score_stage(rows, row)
        if row == "emulator_zero_shot":
            return workspace.score_stage(rows, row, bundle)
        if row == "full":
            return workspace.score_stage(rows, row, workspace.full_fine_tuning_stage(full, rows))
        if row == "emulator":
            return workspace.score_stage(rows, row, bundle, tune)
        if row == "plug_in":
            return workspace.score_stage(rows, row, adapter=plugged)
        bound = _protocol(workspace, workspace.pack_stage(uncompressed_spec(compressor.spec, middle)), spec, rows)
        return workspace.score_stage(rows, row, adapter=bound[-1])

    scores = {row: score(row) for row in recipe.rows}
    return GridPoint(dataset, rows, compressor, method, seed, scores, pack, tune, protocol)


def _protocol(workspace: Workspace, pack: Stage, spec: TuneSpec, rows: Rows) -> tuple[Stage, ...]:
    """The five stages of the protocol, in order: pack, verify the bundle, tune, verify the return, plug in."""

    def stages() -> Iterator[Stage]:
        yield pack
        yield (bundle := workspace.verify_bundle_stage(pack))
        yield (tune := workspace.tune_stage(bundle, spec, rows))
        yield (returned := workspace.verify_return_stage(tune))
        yield workspace.plug_in_stage(returned)

    return tuple(stages())
