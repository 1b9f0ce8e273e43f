"""Every error of the package has a next step, and what a step names is there: verbs, flags, extras, documents.

A site whose step names nothing that can be checked, asks nobody, and is in no case of test_steps_work.py fails.
"""

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import typer.main

from next_steps.sites import GAP, Site, sites
from next_steps.test_steps_work import RUN
from offsite.cli.app import build
from offsite.config import TABLES

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"`offsite ([^`]*)`")
FOREIGN = re.compile(r"`(?!offsite )[^`]*`|\bhf download .*")  # commands of other programs
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
EXTRA = re.compile(r"offsite-tuning\[([a-z-]+)\]")
DOCUMENT = re.compile(r"\b((?:docs/)?[\w-]+\.md)\b")
# Errors that another error takes the place of before anybody sees them; each function catches them by its callers.
SEEN_BY_NOBODY = {
    *("storage/regular_files.py", "storage/snapshot.py", "protocol/signed_folder.py", "protocol/bundle_rules.py"),
    *("models/families/derive_family.py", "models/stored_names.py"),
    *("models/detect_family.py", "data/pictures/picture_files.py", "data/pictures/picture_workers.py"),
}
# What a person does: to files, to settings, to the disk, or to the other party.
ACTS = re.compile(
    r"\b(name|give|choose|leave|correct|copy|call|put|take|use|write|make|ask|free|raise|lower|set|send|see|check|verify"
    r"|fetch|import|export|run|start|continue|remove|delete|move|save|install|download|wait|tune|score|pack|plug|pip|add"
    r"|unpack|convert|correct|compare|keep|read|decode|train|try|drop|end|join|merge|get|open|list|hf|iconv|reinstall"
    r"|spell|adapt|prune|stop|replace|point|select|update|upgrade|rename|resume|repeat|share|shorten|split|trust|restore|permit)\b",
    re.IGNORECASE,
)


@cache
def flags_of_verbs() -> dict[str, set[str]]:
    """The flags of every command, such as "trust add"."""
    found: dict[str, set[str]] = {}

    def walk(command: object, path: str) -> None:
        found[path] = {option for one in getattr(command, "params", []) for option in (*one.opts, *one.secondary_opts)}
        found[path] |= {"--help", "--version"}
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{path} {name}".strip())

    walk(typer.main.get_command(build()), "")
    return found


def steps() -> list[tuple[Site, str]]:
    return [(site, step) for site in sites() for step in site.steps]


EACH = pytest.mark.parametrize(
    ("site", "step"), [pytest.param(site, step, id=f"{site.file}:{site.line}") for site, step in steps()]
)


def test_the_source_is_read() -> None:
    assert len(sites()) > 200
    assert sum(bool(site.steps) for site in sites()) > 150


def test_every_error_has_a_next_step() -> None:
    assert [str(site) for site in sites() if not site.steps and site.file not in SEEN_BY_NOBODY] == []


@pytest.mark.parametrize(
    ("site", "step"), [pytest.param(site, step, id=f"{site.file}:{site.line}") for site, step in steps()]
)
def test_what_a_step_names_is_there(site: Site, step: str) -> None:
    for words in COMMAND.findall(step):
        verbs = words.split()
        if verbs[0] == GAP:  # the verb that was run
            continue
        path = " ".join(verbs[:2]) if " ".join(verbs[:2]) in flags_of_verbs() else verbs[0]
        assert path in flags_of_verbs(), f"{site}: no command {words!r}"
        for flag in FLAG.findall(words):
            assert flag in flags_of_verbs()[path] | flags_of_verbs()[""], f"{site}: {path} has no {flag}"
    every = set().union(*flags_of_verbs().values())
    for flag in FLAG.findall(FOREIGN.sub("", step)):
        assert flag in every, f"{site}: no command has {flag}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra in set(EXTRA.findall(step)):
        assert extra in extras, f"{site}: there is no extra {extra}"
    for document in DOCUMENT.findall(step):
        assert (ROOT / document).exists() or (ROOT / "docs" / document).exists(), f"{site}: no {document}"


def test_every_extra_that_is_asked_for_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = set()
    for file in (ROOT / "src" / "offsite").rglob("*.py"):
        asked |= set(re.findall(r'require\(\s*"[\w.]+",\s*"([\w-]+)"', file.read_text(encoding="utf-8")))
    assert asked
    assert asked <= set(extras)


def test_settings_that_steps_name_exist() -> None:
    known = {key for spec in TABLES.values() for key in spec.settings()}
    named = {word for _, step in steps() for word in re.findall(r"\b([a-z]+(?:_[a-z]+)+)\b", step)}
    assert named - known - ALLOWED_WORDS == set()


ALLOWED_WORDS = frozenset(  # keys of model configs and of recipes, columns, calls of Python, files
    """
    tie_word_embeddings eos_token pad_token bos_token chat_template tokenizer_config preprocessor_config adapter_config
    generation_config max_train_rows max_test_rows crop_size do_center_crop flatten_indices save_pretrained
    from_pretrained merge_and_unload model_type vocab_size weight_map image_size save_to_disk fine_label pytorch_model
    pretrained_cfg safe_serialization language_families
    """.split()  # noqa: SIM905  easier to read than quoted words
)


@pytest.mark.parametrize(
    ("site", "step"), [pytest.param(site, step, id=f"{site.file}:{site.line}") for site, step in steps()]
)
def test_every_step_is_a_case(site: Site, step: str) -> None:
    """A step is run by a test, names a command or flag that was checked above, or tells a person what to do."""
    run = any(case.file == site.file and case.says in step for case in RUN)
    named = COMMAND.search(step) or FLAG.search(step) or EXTRA.search(step)
    assert run or named or step.startswith(GAP) or ACTS.search(step), f"{site}: nothing to do in {step!r}"


def test_most_steps_that_people_meet_are_run() -> None:
    """So that no case is lost with a change of words."""
    run = {site for site, step in steps() if any(case.file == site.file and case.says in step for case in RUN)}
    assert len(run) >= 100
