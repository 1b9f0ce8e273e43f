"""Prepares a study before its first stage: parties, base, rows, and the check that every setting fits the base."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offsite.config import PackSpec
from offsite.data.data_files import Part, data_digest, files_of
from offsite.data.file_formats import read_records
from offsite.data.parse_row import parse_row, with_our_names
from offsite.data.read_rows import counted, first, read_rows
from offsite.data.row import Row, RowForm
from offsite.data.text_files import kind
from offsite.errors import DataError, IncompatibleError, OffsiteError, UsageError
from offsite.model_owner.base_model import BaseModel, open_base
from offsite.model_owner.calibration.calibration_pictures import photos
from offsite.model_owner.check_packing import require_packable
from offsite.model_owner.emulator_work import work_of
from offsite.model_owner.partition import partition
from offsite.protocol.artifacts import Base
from offsite.protocol.home import Home
from offsite.protocol.output_place import require_outside
from offsite.storage.files import replace_file
from offsite.storage.leftovers import is_leftover
from offsite.study.demos.picture_data import list_pictures_for_study
from offsite.study.demos.pretrained import IMAGE_SIZE, cached_encoder, cached_smollm2
from offsite.study.recipe import SMOLLM2, VIT_S14, DataTable, Recipe, require_files
from offsite.study.resumable_chain import OWNER, TUNER
from offsite.study.run_command import run_command
from offsite.study.stages import Rows, Workspace

_MARK = "stages"  # the sub-folder by which the folder of a study is recognised


def prepare(recipe: Recipe, out: Path, say: Callable[[str], None]) -> tuple[Workspace, dict[str, Rows]]:
    """Prepare the folder of a study, and check everything that can be checked before the first stage runs.

    Args:
        recipe: from `load_recipe`.
        out: the study's folder: new, or that of an earlier run.
        say: called with a short text before each step that takes long.

    Returns:
        The workspace, and the files of each data set by its name.

    Raises:
        UsageError: files are missing, the folder holds other things, or a setting does not fit the base.
        DataError: rows of a data set are wrong.
        IncompatibleError: the base is not the one that the recipe describes, or cannot be split as the recipe says.
    """
    require_files(recipe)
    _require_study_folder(out)
    base = _base(recipe, say)
    require_recipe_fits_base(recipe, base)
    stage = write_rows if open_base(Base(base)).family.vision is None else list_pictures_for_study
    rows = {table.name: stage(table, out / TUNER / "data") for table in recipe.data}
    (out / _MARK).mkdir(parents=True, exist_ok=True)
    introduce(out)
    return Workspace(out.resolve(), base.resolve(), _base_digest(base, out, say), recipe.eval, recipe.plug_in), rows


def _require_study_folder(out: Path) -> None:
    """Check that a folder is new, empty, or that of an earlier run of a study.

    Raises:
        UsageError: it has other files, or is inside a model or an artifact.
    """
    require_outside(out)
    held = {path.name for path in out.iterdir() if not is_leftover(path.name)} if out.is_dir() else set()
    if held - {TUNER} and not (out / _MARK).is_dir():  # rows alone are those of a study that was refused after them
        raise UsageError(
            f"{out} contains files that are not of a study",
            reasons=[f"it has no folder {_MARK}/"],
            next_step="name a new folder with --out; nothing was changed",
        )


def _base(recipe: Recipe, say: Callable[[str], None]) -> Path:
    """The recipe's base folder; a pretrained model is downloaded and imported if it is not in the user's cache.

    `say` is called with a short text before a download.
    """

    def run(words: Sequence[str | Path]) -> Any:
        return run_command(words, "the study").result

    if recipe.base == SMOLLM2:
        return cached_smollm2(lambda: say("getting SmolLM2-135M-Instruct"), run)[0]
    if recipe.base == VIT_S14:
        return cached_encoder(lambda: say("getting a ViT-S/14 (DINOv2)"), run, IMAGE_SIZE)[0]
    return Path(recipe.base)


def require_recipe_fits_base(recipe: Recipe, base: Path) -> None:
    """Check that the base is the one that the recipe describes, and that it can be packed with the recipe's settings.

    Raises:
        IncompatibleError: the base has another family or another number of blocks than the recipe says.
        UsageError: a setting does not fit the base; all such settings are listed.
    """
    model = open_base(Base(base))
    reasons = []
    if recipe.architecture not in (None, model.family.model_type):
        reasons.append(f"architecture {model.family.model_type}, the recipe says {recipe.architecture}")
    if recipe.blocks not in (None, model.blocks):
        reasons.append(f"{model.blocks} blocks, the recipe says {recipe.blocks}")
    if reasons:
        raise IncompatibleError(
            f"{base} is not the base of this recipe", reasons=reasons, next_step="name the right one with --base"
        )
    for one in recipe.compressors:
        label = f"[[pack]] {one.name!r}" + (f" at {one.placement!r}" if one.placement else "")
        reasons += [f"{label}: {problem}" for problem in _problems_with_base(model, one.spec)]
    if model.family.vision is not None:
        reasons += [
            f"[[data]] {table.name!r}.score: pictures have no {table.score!r}; leave it out or say 'accuracy'"
            for table in recipe.data
            if table.score == "accuracy_norm"
        ]
    if reasons:
        raise UsageError(
            f"the recipe does not fit the base {base}", reasons=reasons, next_step="correct the recipe; nothing was run"
        )


def _problems_with_base(model: BaseModel, spec: PackSpec) -> Sequence[str]:
    """Why the base cannot be packed with these settings, as one message or none."""
    try:
        require_packable(model, spec)
        if model.family.vision is not None:
            _require_pictures(model, spec)
    except OffsiteError as error:
        return [". ".join((error.what, *error.reasons, *([error.next_step] if error.next_step else [])))]
    return []


def _require_pictures(model: BaseModel, spec: PackSpec) -> None:
    """Check that calibration pictures exist if selecting or healing blocks needs them.

    Raises:
        UsageError: pictures are needed, the recipe names none, and none are installed.
    """
    middle = partition(model, spec).middle
    chooses = spec.selection_rule.runs_blocks and spec.kept(middle) < len(middle)
    if (work_of(middle, spec).block_by_block or chooses) and spec.calibration.source is None:
        photos()


def introduce(out: Path) -> None:
    """Create a home with a key for each party, and make the parties trust each other's keys; existing keys are kept."""
    homes = {party: Home(out / party / "home") for party in (OWNER, TUNER)}
    for party, home in homes.items():
        if not (home.folder / "key.pem").exists():
            home.create_identity(party)
    homes[OWNER].trust(TUNER, homes[TUNER].identity().public_key, "data-owner")
    homes[TUNER].trust(OWNER, homes[OWNER].identity().public_key, "model-owner")


def _base_digest(base: Path, out: Path, say: Callable[[str], None]) -> str:
    """The SHA-256 over the base's files; stored in `out`, and computed again only if a file's size or time changed."""
    files = sorted(file for file in base.rglob("*") if file.is_file())
    seen = [[str(base.resolve())], *([file.name, (at := file.stat()).st_size, at.st_mtime_ns] for file in files)]
    known = out / "experimenter" / "base.json"
    try:
        record = json.loads(known.read_bytes())
        if record["files"] == seen:
            return str(record["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    say(f"reading the base {base}")
    digest = data_digest(base)
    replace_file(known, json.dumps({"files": seen, "digest": digest}).encode())
    return digest


def write_rows(table: DataTable, folder: Path) -> Rows:
    """Write the rows of a data set that the study uses as JSONL files; a plain text file is used where it is.

    Args:
        table: the data set, from the recipe.
        folder: the folder for the data owner's data.

    Raises:
        DataError: a row is wrong, or is not multiple choice although the score needs it, or the recipe limits the
            number of rows of a plain text file.
    """
    parts = {"train": (table.train, table.max_train_rows), "test": (table.test, table.max_test_rows)}
    made = {}
    for part, (source, most) in parts.items():
        if not _has_records(source):
            read_rows(source)
            if most is not None:
                raise DataError(
                    f"[[data]] {table.name!r}: {source} is not made of records, of which some could be taken",
                    next_step=f"leave out max_{part}_rows, and cut the file by hand",
                )
            made[part] = source.resolve()
            continue
        records = _records(table, part, source, most)
        content = "".join(json.dumps(fields, default=str) + "\n" for fields in records).encode()
        digest = hashlib.sha256(content).hexdigest()[:8]  # another number of rows gets another file name
        made[part] = folder / f"{table.name.replace('/', '-')}.{part}.{digest}.jsonl"
        if not made[part].exists():
            replace_file(made[part], content)
    return Rows(made["train"], made["test"], f"{data_digest(made['train'])} {data_digest(made['test'])}")


def _has_records(source: Path) -> bool:
    """Whether a data set consists of records (rows with fields), and not of plain text."""
    return source.is_dir() or kind(source) != ".txt"


def _records(table: DataTable, part: str, source: Path, most: int | None) -> list[dict[str, Any]]:
    """Read one part of a data set as records with offsite's own field names.

    Args:
        table: the data set, from the recipe.
        part: "train" or "test".
        source: the file or folder of this part.
        most: the largest number of records, spread evenly over the part; None means all.

    Raises:
        DataError: a row is invalid, or there are none.
    """
    picked, problems = [], []
    form = RowForm(table.columns or {})
    wanted: Part = "train" if part == "train" else "held out"
    for record in (record for file in files_of(source, wanted) for record in read_records(file)):
        place = f"{record.file}:{record.number}"
        if isinstance(record.fields, str):
            problems.append(f"{place}: {record.fields}")
            continue
        row = parse_row(record.fields, record.number, form)
        if isinstance(row, str):
            problems.append(f"{place}: {row}")
        elif part == "test" and table.score != "loss" and not row.choices:
            problems.append(f"{place}: no multiple choice, which score = {table.score!r} needs")
        if isinstance(row, Row) and not row.left_out:
            picked.append(with_our_names(record.fields, form))
    if problems or not picked:
        raise DataError(
            f"[[data]] {table.name!r}: {counted(problems, 'bad row')} in {source}"
            if problems
            else f"{source} is empty",
            reasons=first(problems),
            next_step="correct the file or the [[data]] table; docs/data.md shows every kind of row",
        )
    count = len(picked)
    return [picked[i * count // most] for i in range(most)] if most is not None and most < count else picked
