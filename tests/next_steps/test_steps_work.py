"""What an error advises is done, and then the command works: by the words of a command line, or by an edit of a file.

RUN lists every case; test_every_site.py reads from it which errors have one.
"""

import importlib.util
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts import GONE, edit_json, full_return, lora_return, packed
from next_steps import (
    data_cases,
    file_cases,
    format_cases,
    hostile_cases,
    import_cases,
    model_cases,
    owner_cases,
    pack_cases,
    picture_cases,
    plug_in_cases,
    score_cases,
    source_cases,
    study_cases,
    talk_cases,
    tune_cases,
    tuner_cases,
)
from next_steps.sites import ROOT
from next_steps.world import EVAL, OUT, PACK, PLUG, TUNE, Case, World, file, run, runs, then
from offsite.cli import main
from offsite.errors import OffsiteError
from offsite.training.run_log import run_folder
from tiny import (
    Parties,
    tiny_base,
    tiny_parties,
    tiny_pictures,
    tiny_rows,
    tiny_tokenizer,
    tiny_vision_base,
)


def interrupted(world: World) -> None:
    run = run_folder(world.folder / "out")
    run.mkdir()
    for name in ("run.json", "state.json"):
        (run / name).write_text("{}")


def advised_out(world: World, step: str) -> str:
    _, _, words = step.partition("--out ")
    return f"{TUNE} --out {words.split(';')[0].split(',')[0]}"


def trust_first(world: World, step: str) -> None:
    assert main(world.words("keygen --home {tuner} --out {folder}/hospital.pub")) == 0
    assert main(world.words("trust add hospital {folder}/hospital.pub --home {owner}")) == 0


def distrusted(world: World) -> None:
    world.parties.owner.distrust("hospital")


def left_behind(world: World) -> None:
    (world.folder / "bundle" / ".DS_Store").write_text("x")


def readable(world: World) -> None:
    (world.parties.data_owner.folder / "key.pem").chmod(0o644)


def latin(world: World) -> None:
    (world.folder / "text.txt").write_bytes("Gr\u00fc\u00dfe, und noch mehr davon. ".encode("cp1252") * 20)


def rows_of_another_name(world: World) -> None:
    (world.folder / "rows.jsonl").write_text('{"q": "a", "a": "b"}\n' * 4)


def preferences(world: World) -> None:
    (world.folder / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)


def long_rows(world: World) -> None:
    row = json.dumps({"prompt": "a", "completion": "b c d e " * 40})
    short = json.dumps({"prompt": "a", "completion": "b"})
    (world.folder / "rows.jsonl").write_text(f"{row}\n{short}\n")


def cut_rows(world: World, step: str) -> str:
    (world.folder / "cut.toml").write_text('[tune]\nlong_rows = "truncate"\n')
    return f"{TUNE}{OUT} --config {{folder}}/cut.toml"


def named_end(world: World, step: str) -> None:
    edit_json(world.folder / "base" / "tokenizer_config.json", eos_token="</s>")


def no_end(world: World) -> None:
    edit_json(world.folder / "base" / "tokenizer_config.json", eos_token=GONE)
    (world.folder / "base" / "special_tokens_map.json").unlink(missing_ok=True)


def broken_tokenizer(world: World) -> None:
    (world.folder / "base" / "tokenizer.json").write_text("{")


def copied_tokenizer(world: World, step: str) -> None:
    tiny_tokenizer(world.folder / "base")


def broken_template(world: World) -> None:
    (world.folder / "base" / "chat_template.jinja").write_text("{% for")


def no_template(world: World, step: str) -> None:
    (world.folder / "base" / "chat_template.jinja").unlink()


def broken_generation(world: World) -> None:
    edit_json(world.folder / "base" / "generation_config.json", max_new_tokens=0)


def right_generation(world: World, step: str) -> None:
    edit_json(world.folder / "base" / "generation_config.json", max_new_tokens=GONE)


def no_config(world: World) -> None:
    shutil.copytree(world.folder / "base", world.folder / "published")
    (world.folder / "base" / "config.json").unlink()


def imported(world: World, step: str) -> str:
    assert "`offsite import MODEL --out base/`" in step
    assert main(world.words("import {folder}/published --out {folder}/again")) == 0
    return f"{PACK.replace('/base', '/again')}{OUT}"


def two_parts(world: World) -> None:
    for name in ("one", "two"):
        (world.folder / "set" / name).mkdir(parents=True)
        shutil.copy(world.folder / "rows.jsonl", world.folder / "set" / name / "rows.jsonl")


def several_configs(world: World) -> None:
    (world.folder / "set").mkdir()
    for name in ("one", "two"):
        shutil.copy(world.folder / "rows.jsonl", world.folder / "set" / f"{name}.jsonl")
    listed = "".join(f"- config_name: {name} rows\n  data_files: {name}.jsonl\n" for name in ("one", "two"))
    (world.folder / "set" / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")


def named_as_it_says(world: World, step: str) -> str:
    place = step.partition("name one of them as ")[2]
    return f"{TUNE.replace('{folder}/rows.jsonl', shlex.quote(place))}{OUT}"


def second_key(world: World, step: str) -> str:
    return "keygen --out {folder}/again.pub --home {owner}"


RUN = (
    Case("no folder for the return", "cli/data_owner.py", TUNE, "--out return/", then(TUNE + OUT)),
    Case(
        "a check and a plan", "cli/data_owner.py", f"{TUNE} --check --plan", "give one of them", then(f"{TUNE} --check")
    ),
    Case(
        "no rows to score",
        "cli/eval_verb.py",
        "eval {folder}/base",
        "give rows with --data",
        then(EVAL),
        what="there is nothing to score on",
    ),
    Case(
        "a check without rows",
        "cli/eval_verb.py",
        "eval {folder}/base --samples 2 --tasks x",
        "give rows with --data",
        then(EVAL),
        what="are about rows",
    ),
    Case(
        "scores into a folder",
        "cli/eval_verb.py",
        f"{EVAL} --row-scores {{folder}}",
        "name a file with --row-scores",
        then(f"{EVAL} --row-scores {{folder}}/s"),
    ),
    Case(
        "scores over the rows",
        "cli/eval_verb.py",
        f"{EVAL} --row-scores {{folder}}/rows.jsonl",
        "name another file with --row-scores",
        then(f"{EVAL} --row-scores {{folder}}/s"),
    ),
    Case(
        "a probe of a language model", "cli/eval_verb.py", f"{EVAL} --probe {{folder}}", "leave --probe out", then(EVAL)
    ),
    Case("an option twice", "cli/flags.py", f"{TUNE} --rank 3{OUT}", "give it once", then(TUNE + OUT)),
    Case(
        "a plan that there is not",
        "cli/flags.py",
        f"{TUNE}{OUT} --plan=all",
        "give --plan alone",
        then(f"{TUNE}{OUT} --plan"),
    ),
    Case(
        "a key over another file",
        "cli/keys.py",
        "keygen --home {owner} --out {folder}/rows.jsonl",
        "name another file with --out",
        then("keygen --home {owner} --out {folder}/k.pub"),
    ),
    Case(
        "strengths without rows",
        "cli/model_owner.py",
        f"{PLUG}{OUT} --strengths 0.5,1",
        "give one --strength",
        then(f"{PLUG}{OUT} --strength 0.5"),
    ),
    Case(
        "columns without rows",
        "cli/model_owner.py",
        f"{PLUG}{OUT} --columns text=t",
        "leave these out",
        then(PLUG + OUT),
    ),
    Case(
        "a measured plug-in",
        "cli/model_owner.py",
        f"{PLUG}{OUT} --plan measure",
        "give --plan alone",
        then(f"{PLUG}{OUT} --plan"),
    ),
    Case(
        "a plan that chooses",
        "cli/model_owner.py",
        f"{PLUG}{OUT} --plan --choose-on {{folder}}/rows.jsonl",
        "out of the plan; scoring holds",
        then(f"{PLUG}{OUT} --plan"),
    ),
    Case(
        "no settings file",
        "config/settings_file.py",
        f"{TUNE}{OUT} --config {{folder}}/none.toml",
        "leave --config out",
        then(TUNE + OUT),
    ),
    Case(
        "settings that are no TOML",
        "config/settings_file.py",
        f"{TUNE}{OUT} --config {{folder}}/s.toml",
        "correct it there",
        lambda w, s: file("s.toml", "[tune]\nrank = 3\n")(w),
        file("s.toml", "[tune\n"),
    ),
    Case(
        "settings of no table",
        "config/settings_file.py",
        f"{TUNE}{OUT} --config {{folder}}/s.toml",
        "the tables are",
        lambda w, s: file("s.toml", "[tune]\nlr = 1e-3\n")(w),
        file("s.toml", "lr = 1\n"),
    ),
    Case(
        "an unknown setting",
        "config/settings_file.py",
        f"{TUNE}{OUT} --config {{folder}}/s.toml",
        "the settings of [",
        lambda w, s: file("s.toml", "[tune]\nlr = 1e-3\n")(w),
        file("s.toml", "[tune]\nrate = 1\n"),
    ),
    Case(
        "two ways of one setting",
        "config/settings_file.py",
        f"{TUNE}{OUT} --epochs 1",
        "give one of them",
        then(TUNE + OUT),
    ),
    Case(
        "rows of other names",
        "data/read_rows.py",
        TUNE + OUT,
        "name the columns with --columns",
        then(f"{TUNE}{OUT} --columns prompt=q,completion=a"),
        rows_of_another_name,
    ),
    Case(
        "preferences", "data/read_rows.py", TUNE + OUT, "correct these rows", then(f"{TUNE}{OUT} --chosen"), preferences
    ),
    Case(
        "no rows",
        "data/read_rows.py",
        TUNE + OUT,
        "with rows such as",
        lambda w, s: tiny_rows(w.folder / "rows.jsonl", 4) and None,
        file("rows.jsonl", "\n"),
    ),
    Case(
        "rows that are too long",
        "data/tokens.py",
        TUNE + OUT,
        "long_rows",
        cut_rows,
        long_rows,
        what="over the longest length",
    ),
    Case(
        "text in another encoding",
        "data/text_files.py",
        TUNE.replace("rows.jsonl", "text.txt") + OUT,
        "iconv",
        lambda w, s: runs(w, s) or TUNE.replace("rows.jsonl", "utf8-text.txt") + OUT,
        latin,
    ),
    Case(
        "an empty text",
        "data/text_files.py",
        TUNE.replace("rows.jsonl", "text.txt") + OUT,
        "write some text into it",
        lambda w, s: file("text.txt", "a few words\n")(w),
        file("text.txt", " \n"),
    ),
    Case(
        "several subsets",
        "data/hub_configs.py",
        TUNE.replace("rows.jsonl", "set") + OUT,
        "name one of them as",
        named_as_it_says,
        several_configs,
    ),
    Case(
        "several data sets",
        "data/text_files.py",
        TUNE.replace("rows.jsonl", "set") + OUT,
        "check the path",
        then(TUNE.replace("rows.jsonl", "set/one") + OUT),
        two_parts,
    ),
    Case(
        "scores of no rows",
        "data_owner/check_permissions.py",
        f"{TUNE}{OUT} --report-scores",
        "--eval-data",
        then(f"{TUNE}{OUT} --report-scores --eval-data {{folder}}/rows.jsonl"),
    ),
    Case(
        "a rank that is not permitted",
        "data_owner/check_permissions.py",
        f"{TUNE.replace('--rank 2', '--rank 65')}{OUT}",
        "choose what the bundle permits",
        then(TUNE + OUT),
    ),
    Case(
        "more checkpoints than steps",
        "training/schedule.py",
        f"{TUNE}{OUT} --checkpoints 9",
        "--checkpoints",
        then(f"{TUNE}{OUT} --checkpoints 2"),
    ),
    Case(
        "another run to resume",
        "training/run_identity.py",
        f"{TUNE}{OUT} --resume",
        "or remove it to start again",
        lambda w, s: runs(w, s) or TUNE + OUT,
        interrupted,
    ),
    Case(
        "an interrupted run",
        "training/run_log.py",
        TUNE + OUT,
        "or remove it to start again",
        lambda w, s: runs(w, s),
        interrupted,
    ),
    Case(
        "a log in the return",
        "training/tensorboard.py",
        f"{TUNE}{OUT} --tensorboard {{folder}}/out/log",
        "--tensorboard",
        then(TUNE + OUT),
    ),
    Case(
        "a file in the bundle",
        "protocol/verify.py",
        "verify {folder}/bundle --home {tuner}",
        "delete these files",
        lambda w, s: runs(w, s),
        left_behind,
    ),
    Case(
        "a bundle as a base",
        "model_owner/base_model.py",
        f"{PACK.replace('/base', '/bundle')}{OUT}",
        "name the base model's folder",
        then(PACK + OUT),
    ),
    Case(
        "nothing signed",
        "protocol/verify.py",
        "verify {folder}/base --home {tuner}",
        "name the folder that was received",
        then("verify {folder}/bundle --home {tuner}"),
    ),
    Case(
        "a return in place of a bundle",
        "protocol/verify.py",
        TUNE.replace("/bundle", "/return") + OUT,
        "'s folder",
        then(TUNE + OUT),
    ),
    Case(
        "a name that nobody has",
        "protocol/home.py",
        PACK + OUT,
        "offsite trust add",
        trust_first,
        distrusted,
        what="nobody called",
    ),
    Case("a key that others can read", "protocol/home.py", TUNE + OUT, "chmod 600", lambda w, s: runs(w, s), readable),
    Case(
        "a second key",
        "protocol/home.py",
        "keygen --name other --out {folder}/k.pub --home {owner}",
        "without --name",
        second_key,
    ),
    Case(
        "no key",
        "protocol/home.py",
        "keygen --out {folder}/k.pub --home {folder}/new",
        "offsite keygen --name",
        then("keygen --name me --out {folder}/k.pub --home {folder}/new"),
    ),
    Case(
        "a party that is not trusted",
        "protocol/home.py",
        "trust remove nobody --home {owner}",
        "offsite trust list",
        then("trust list --home {owner}"),
        what="is trusted",
    ),
    Case(
        "a folder that is taken",
        "storage/files.py",
        f"{TUNE} --out {{folder}}",
        "name another folder with ",
        then(TUNE + OUT),
    ),
    Case(
        "a place in the bundle",
        "protocol/output_place.py",
        f"{TUNE} --out {{folder}}/bundle/new",
        "name a place outside",
        advised_out,
    ),
    Case(
        "the place of an input",
        "protocol/output_place.py",
        f"{TUNE} --out {{folder}}/bundle",
        "name a new folder",
        advised_out,
    ),
    Case("no end token", "model_owner/check_bundle.py", PACK + OUT, "eos_token", named_end, no_end),
    Case(
        "a broken tokenizer",
        "model_owner/check_bundle.py",
        PACK + OUT,
        "copy the tokenizer's files",
        copied_tokenizer,
        broken_tokenizer,
    ),
    Case(
        "a broken template",
        "evaluation/first_row.py",
        PACK + OUT,
        "take it out",
        no_template,
        broken_template,
        what="cannot write a question",
    ),
    Case(
        "broken generation settings",
        "evaluation/first_row.py",
        PACK + OUT,
        "or take it out",
        right_generation,
        broken_generation,
        what="transformers refuses",
    ),
    Case(
        "no config",
        "model_owner/base_model.py",
        PACK + OUT,
        "offsite import MODEL",
        imported,
        no_config,
        what="so it is not a base folder",
    ),
    Case(
        "too many blocks at the ends",
        "model_owner/partition.py",
        PACK.replace("--top 1", "--top 4") + OUT,
        "smaller --bottom or --top",
        then(PACK + OUT),
    ),
    Case(
        "no checkpoint",
        "models/model_folder.py",
        "eval {folder}/set --data {folder}/rows.jsonl",
        "name a base, bundle or merged plug-in",
        then(EVAL),
        two_parts,
    ),
    *import_cases.CASES,
    *owner_cases.CASES,
    *tuner_cases.CASES,
    *picture_cases.CASES,
    *data_cases.CASES,
    *score_cases.CASES,
    *tune_cases.CASES,
    *source_cases.CASES,
    *format_cases.CASES,
    *model_cases.CASES,
    *pack_cases.CASES,
    *plug_in_cases.CASES,
    *file_cases.CASES,
    *study_cases.CASES,
    *talk_cases.CASES,
    *hostile_cases.CASES,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    parties = tiny_parties(folder)
    base = tiny_base(folder / "base", blocks=3)
    assert main([*World(folder, parties).words(f"{PACK} --out {{folder}}/bundle")]) == 0
    from offsite.protocol.verify import verify_bundle

    lora_return(verify_bundle(folder / "bundle", parties.data_owner), folder / "return", parties.data_owner)
    tiny_rows(folder / "rows.jsonl", 8)
    assert base.is_dir()
    if importlib.util.find_spec("PIL"):
        encoder = tiny_vision_base(folder / "encoder", "vit", 3)
        tiny_pictures(folder / "pictures", 4)
        bundle = packed(encoder, folder / "encoder-bundle", parties)
        full_return(bundle, folder / "encoder-return", parties.data_owner, classes=("blue", "green", "red"))
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    folder = Path(shutil.copytree(made, tmp_path / "a world"))
    from offsite.protocol.home import Home

    return World(folder, Parties(Home(folder / "acme-home"), Home(folder / "hospital-home")), monkeypatch)


@pytest.fixture
def places() -> Iterator[list[tuple[Path, int]]]:
    """File and line of every error of the package that is made during a test."""
    found: list[tuple[Path, int]] = []
    make = OffsiteError.__init__

    def noted(self: OffsiteError, *words: Any, **more: Any) -> None:
        caller = sys._getframe(1)
        found.append((Path(caller.f_code.co_filename), caller.f_lineno))
        make(self, *words, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OffsiteError, "__init__", noted)
        yield found


@pytest.mark.parametrize("case", RUN, ids=lambda case: case.name)
def test_the_step_works(
    case: Case, world: World, capsys: pytest.CaptureFixture[str], places: list[tuple[Path, int]]
) -> None:
    [site] = case.sites()
    case.spoil(world)
    error = run(world, case.command, capsys)
    assert error is not None, "it works"
    assert case.worker or (ROOT / site.file, site.line) in places, error
    what, step = error
    assert case.what in what, error
    assert case.says in step, error
    again = case.mend(world, step) or case.command
    assert run(world, again, capsys) is None, step
