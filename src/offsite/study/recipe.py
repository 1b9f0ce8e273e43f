"""Reads a recipe: a TOML file that describes the grid of a study. docs/study.md shows how to write one.

A [[pack]] table has a name and any settings of PackSpec, a [[tune]] table a name and any settings of TuneSpec. The
settings are not listed here, so a recipe can always use all of them.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import Field, ValidationError

from offsite.config import EvalSpec, PackSpec, PlugInSpec, Spec, TuneSpec, problems_of, unpermitted
from offsite.config.setting_types import Columns
from offsite.encodings import decode_text
from offsite.errors import UsageError
from offsite.spelling import suggest

RowName = Literal["zero_shot", "emulator_zero_shot", "full", "adapter_on_base", "emulator", "plug_in"]
ROWS: tuple[RowName, ...] = get_args(RowName)  # in the order of every result table
SMOLLM2, VIT_S14 = "smollm2", "vit-s14"  # bases that come from a package registry
_Name = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[^|\n]+$")]
S = TypeVar("S", bound=Spec)


class DataTable(Spec):
    """A data set: rows that the data owner tunes on, and held-out rows that every model is scored on."""

    name: _Name
    train: Annotated[Path, Field(description="rows to tune on, relative to --data-root or to the recipe")]
    test: Annotated[Path, Field(description="rows to score on, relative to --data-root or to the recipe")]
    max_train_rows: Annotated[int | None, Field(ge=1, description="rows to use, spread evenly; left out: all")] = None
    max_test_rows: Annotated[int | None, Field(ge=1, description="rows to use, spread evenly; left out: all")] = None
    columns: Columns = None
    score: Annotated[
        Literal["loss", "accuracy", "accuracy_norm"],
        Field(description="score that is reported in addition to the loss; for text, accuracies need multiple choice"),
    ] = "loss"
    tune: Annotated[
        dict[str, Any],
        Field(description="settings of every [[tune]] and of full fine-tuning on this set, e.g. epochs, lr or augment"),
    ] = Field(default_factory=dict)


class RecipeTables(Spec):
    """The tables of a recipe file as written; the settings of a stage are checked by that stage's spec."""

    title: Annotated[str, Field(min_length=1, max_length=200)]
    about: str = ""
    base: Annotated[str, Field(min_length=1, description=f"a base folder, or {SMOLLM2!r} or {VIT_S14!r}")]
    architecture: Annotated[str | None, Field(description="the model type that the base must have")] = None
    blocks: Annotated[int | None, Field(ge=1, description="how many blocks the base must have")] = None
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    rows: Annotated[tuple[RowName, ...], Field(min_length=1)] = ROWS
    keep_models: Annotated[bool, Field(description="keep merged plug-ins and fully tuned models once scored")] = True
    data: Annotated[tuple[DataTable, ...], Field(min_length=1)]
    pack: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    placement: tuple[dict[str, Any], ...] = ()
    tune: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    shared: dict[str, Any] = Field(default_factory=dict)
    full: dict[str, Any] = Field(default_factory=dict)
    plug_in: dict[str, Any] = Field(default_factory=dict)
    eval: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Compressor:
    """One way to pack a bundle: the settings of a [[pack]] table, and of one [[placement]] table if there are any."""

    name: str
    placement: str  # the name of the [[placement]] table; "" if the recipe has none
    spec: PackSpec


@dataclass(frozen=True)
class Method:
    """One way to tune, and the full fine-tuning that it is compared with."""

    name: str
    spec: TuneSpec  # its seed is set for each grid point
    full: TuneSpec

    def on(self, table: DataTable) -> "Method":
        """A copy with the additional settings that the recipe gives for the data set `table`."""
        return replace(self, spec=self.spec.changed(table.tune), full=self.full.changed(table.tune))


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; every path in it is resolved."""

    file: Path
    title: str
    about: str
    base: str | Path
    architecture: str | None
    blocks: int | None
    seeds: tuple[int, ...]
    rows: tuple[RowName, ...]
    keep_models: bool
    data: tuple[DataTable, ...]
    compressors: tuple[Compressor, ...]
    methods: tuple[Method, ...]
    plug_in: PlugInSpec
    eval: EvalSpec
    missing: tuple[str, ...]  # a message for each file that the recipe names and that does not exist

    @property
    def grid_size(self) -> int:
        """The number of points of the grid: combinations of data set, compressor, method and seed."""
        return len(self.data) * len(self.compressors) * len(self.methods) * len(self.seeds)


def load_recipe(file: Path, *, data_root: Path | None = None, base: Path | None = None) -> Recipe:
    """Read a recipe and check every setting in it.

    Args:
        file: the TOML file.
        data_root: the folder in which data files are looked for first; None: only the recipe's folder is used.
        base: a base folder to use instead of the base that the recipe names.

    Raises:
        UsageError: the file cannot be read, or anything in it is wrong; every problem is listed.
    """
    try:
        content = tomllib.loads(decode_text(file.read_bytes()))
    except OSError as error:
        raise UsageError(
            f"cannot read the recipe {file}: {error.strerror}",
            next_step="name a TOML file; recipes/ has some, and docs/study.md shows how to write one",
        ) from None
    except (UnicodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"the recipe {file} is not TOML",
            reasons=[str(error)],
            next_step="correct it there; docs/study.md shows how a recipe is written",
        ) from None
    try:
        tables = RecipeTables.model_validate(content)
    except ValidationError as error:
        raise _wrong(file, _problems(RecipeTables, error)) from None
    problems: list[str] = []
    places = _SearchPaths(file.resolve().parent, data_root)
    recipe = Recipe(
        file=file,
        title=tables.title,
        about=tables.about,
        base=base if base is not None else _base(tables, places),
        architecture=tables.architecture,
        blocks=tables.blocks,
        seeds=tables.seeds,
        rows=tuple(row for row in ROWS if row in tables.rows),
        keep_models=tables.keep_models,
        data=tuple(one.changed(places.paths(one)) for one in tables.data),
        compressors=tuple(_compressors(tables, places, problems)),
        methods=tuple(_methods(tables, places, problems)),
        plug_in=_spec(PlugInSpec, "[plug_in]", tables.plug_in, problems),
        eval=_spec(EvalSpec, "[eval]", {**_part(EvalSpec, tables.shared), **tables.eval}, problems),
        missing=(),
    )
    problems += _repeated("[[data]]", [one.name for one in recipe.data])
    problems += _repeated("seeds", [str(seed) for seed in recipe.seeds])
    problems += _unknown_shared(tables.shared)
    problems += _problems_of_data_settings(recipe)
    problems += _not_permitted(recipe)
    if problems:
        raise _wrong(file, problems)
    return replace(recipe, missing=tuple(_missing(recipe)))


def require_files(recipe: Recipe) -> None:
    """Check, before any work starts, that all files that a recipe names exist.

    Raises:
        UsageError: files are missing; all of them are listed.
    """
    if recipe.missing:
        raise UsageError(
            f"the recipe {recipe.file} names files that do not exist",
            reasons=recipe.missing,
            next_step="put the files there, or say where they are with --data-root and --base; "
            "--check tries the recipe without them",
        )


def _missing(recipe: Recipe) -> Iterator[str]:
    """Yield a message for each folder or file that a recipe names and that does not exist."""
    if isinstance(recipe.base, Path) and not recipe.base.exists():
        yield f"base: no such folder {recipe.base}"
    named: list[tuple[str, Spec]] = [(f"[[data]] {one.name!r}", one) for one in recipe.data]
    named += [(f"[[pack]] {one.name!r}", one.spec) for one in recipe.compressors]
    named += [(f"[[tune]] {one.name!r}", one.spec) for one in recipe.methods]
    for where, spec in named:
        for name, value in spec.values().items():
            if isinstance(value, Path) and not value.exists():
                yield f"{where}.{name}: no such file {value}"


@dataclass(frozen=True)
class _SearchPaths:
    """The folders in which a recipe's relative paths are looked for: first the data root, then the recipe's folder."""

    recipe: Path
    data_root: Path | None

    def find(self, path: Path) -> Path:
        """The path in the first folder that contains it; if none does, in the first folder, for the error message."""
        roots = [root.resolve() for root in (self.data_root, self.recipe) if root is not None]
        return next((root / path for root in roots if (root / path).exists()), roots[0] / path)

    def paths(self, spec: Spec) -> dict[str, Path]:
        """All settings of a spec that are paths, by key, each replaced by the result of `find`."""
        return {name: self.find(value) for name, value in spec.values().items() if isinstance(value, Path)}


def _base(tables: RecipeTables, places: _SearchPaths) -> str | Path:
    """The base of a recipe: the name of a pretrained model, or the path of a folder."""
    return tables.base if tables.base in (SMOLLM2, VIT_S14) else places.find(Path(tables.base))


def _compressors(tables: RecipeTables, places: _SearchPaths, problems: list[str]) -> Iterator[Compressor]:
    """Yield each [[pack]] table combined with each [[placement]] table; appends messages on mistakes to `problems`."""
    placed = [_named("[[placement]]", table, i, problems) for i, table in enumerate(tables.placement)] or [("", {})]
    packs = [_named("[[pack]]", table, i, problems) for i, table in enumerate(tables.pack)]
    problems += _repeated("[[placement]]", [name for name, _ in placed])
    problems += _repeated("[[pack]]", [name for name, _ in packs])
    for name, own in packs:
        for placement, where in placed:
            label = f"[[pack]] {name!r}" + (f" at [[placement]] {placement!r}" if placement else "")
            problems += [
                f"{label}.{key}: given in both tables; leave it out of one" for key in sorted(own.keys() & where)
            ]
            settings = {**_part(PackSpec, tables.shared), **own, **where}
            spec = _spec(PackSpec, label, settings, problems)
            yield Compressor(name, placement, spec.changed(places.paths(spec)))


def _methods(tables: RecipeTables, places: _SearchPaths, problems: list[str]) -> Iterator[Method]:
    """Yield a method for each [[tune]] table; appends messages on mistakes to `problems`."""
    named = [_named("[[tune]]", table, i, problems) for i, table in enumerate(tables.tune)]
    problems += _repeated("[[tune]]", [name for name, _ in named])
    for name, own in named:
        for where, table in ((f"[[tune]] {name!r}", own), ("[full]", tables.full), ("[shared]", tables.shared)):
            if "seed" in table:
                problems.append(
                    f"{where}.seed: cells have the seeds of the list `seeds`, e.g. seeds = [{table['seed']}]"
                )
        shared = _part(TuneSpec, tables.shared)
        spec = _spec(TuneSpec, f"[[tune]] {name!r}", {**shared, **own}, problems)
        common = {key: value for key, value in own.items() if key not in _METHOD_SETTINGS}
        full = _spec(TuneSpec, "[full]", {**shared, **common, **tables.full, "method": "full"}, problems)
        yield Method(name, spec.changed(places.paths(spec)), full.changed(places.paths(full)))


# Settings of TuneSpec about the adapter and the return, which full fine-tuning does not have.
_METHOD_SETTINGS = TuneSpec.keys_of("adapter") | {"checkpoints", "report_scores"}


def _problems_of_data_settings(recipe: Recipe) -> Iterator[str]:
    """Yield a message for each wrong setting in the `tune` tables of the recipe's data sets."""
    for table in recipe.data:
        where = f"[[data]] {table.name!r}.tune"
        yield from (
            f"{where}.{key}: is the same for all data sets; say it in [[tune]], a seed in `seeds`"
            for key in sorted(table.tune.keys() & (_METHOD_SETTINGS | {"seed"}))
        )
        problems: list[str] = []
        for method in recipe.methods:
            for spec in (method.spec, method.full):
                _spec(TuneSpec, where, spec.flat() | table.tune, problems)
        yield from problems


def _named(where: str, table: Mapping[str, Any], index: int, problems: list[str]) -> tuple[str, dict[str, Any]]:
    """Split a table of a recipe into its name and its other settings; a missing name gives a message in `problems`.

    `where` is the kind of table, such as "[[pack]]", and `index` its index among these, from 0; both are for messages.
    """
    name = table.get("name")
    if not isinstance(name, str) or not name or "|" in name or "\n" in name or len(name) > 60:
        problems.append(
            f'{where} number {index + 1}.name: found {name!r}, expected a short text, e.g. name = "uniform"'
        )
        name = str(index + 1)
    return name, {key: value for key, value in table.items() if key != "name"}


def _part(kind: type[Spec], shared: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the recipe's [shared] table that are settings of this kind of spec."""
    return {name: value for name, value in shared.items() if name in kind.settings()}


def _unknown_shared(shared: Mapping[str, Any]) -> list[str]:
    """A message for each setting in the [shared] table that neither tuning nor scoring has."""
    known = sorted(TuneSpec.settings().keys() | EvalSpec.settings().keys())
    return [_unknown(f"[shared].{name}", name, known) for name in shared if name not in known]


def _spec(kind: type[S], where: str, settings: Mapping[str, Any], problems: list[str]) -> S:
    """Build the spec of a stage; if settings are wrong, append messages to `problems` and return the defaults.

    Messages begin with `where`, the table in the recipe.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        problems += [f"{where}.{line}" for line in _problems(kind, error) if f"{where}.{line}" not in problems]
        return kind()


def _problems(kind: type[Spec], error: ValidationError) -> list[str]:
    """A message for each problem in a validation error, with the setting's name, description and default."""
    lines = []
    for problem in problems_of(error, kind):
        name = problem.place[0] if problem.place else ""
        if problem.unknown and len(problem.place) == 1:
            lines.append(_unknown(name, name, sorted(kind.settings())))
            continue
        setting = kind.settings().get(name)
        field = setting.field if setting else None
        about = f"; {name}: {field.description}" if field is not None and field.description else ""
        works = (
            ""
            if field is None or field.is_required() or len(problem.place) > 1
            else f" (the default is {_toml_word(field.default)})"
        )
        lines.append(f"{problem}{about}{works}")
    return lines


def _toml_word(default: object) -> str:
    """A setting's default as text for an error message; None becomes "to leave it out"."""
    return "to leave it out" if default is None else repr(default)


def _unknown(where: str, name: str, known: Sequence[str]) -> str:
    """The message for an unknown setting, with the known name of most similar spelling, or else all known names.

    It begins with `where`, the setting's table and name.
    """
    return f"{where}: there is no such setting; {suggest(name, known)}"


def _repeated(where: str, names: Sequence[str]) -> list[str]:
    """A message for each name that occurs more than once; it begins with `where`, the table in the recipe."""
    return [f"{where}: {name!r} is there more than once" for name in dict.fromkeys(names) if names.count(name) > 1]


def _not_permitted(recipe: Recipe) -> Iterator[str]:
    """Yield a message for each [[tune]] table that the bundle of a [[pack]] table would not permit."""
    if not {"adapter_on_base", "emulator", "plug_in"} & set(recipe.rows):
        return
    for pack in recipe.compressors:
        for tune in recipe.methods:
            for one in unpermitted(tune.spec, pack.spec.permits):
                action = f"put {tune.spec.adapter.method!r} into" if one.setting == "methods" else "change"
                yield (
                    f"[[tune]] {tune.name!r}.{one.key}: [[pack]] {pack.name!r} permits {one.permitted}; "
                    f"{action} its `{one.setting}`"
                )


def _wrong(file: Path, problems: Sequence[str]) -> UsageError:
    """The error for a recipe with these problems."""
    return UsageError(
        f"the recipe {file} is wrong",
        reasons=list(dict.fromkeys(problems)),
        next_step="correct the recipe; docs/study.md says what each table holds. Nothing was run",
    )
