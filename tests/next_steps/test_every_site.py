"""Every error of the package has a next step, and what a step names is there: verbs, flags, extras, documents.

Every one of them is provoked, and its step followed, by a case of test_steps_work.py.
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


@EACH
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


def test_every_step_is_run() -> None:
    """Every error with a next step has a case in RUN."""
    run = {site for case in RUN for site in case.sites()}
    assert [str(site) for site in sites() if site.steps and site not in run] == []


def test_every_case_is_about_one_error() -> None:
    assert {case.name: [str(site) for site in case.sites()] for case in RUN if len(case.sites()) != 1} == {}
    names = [case.name for case in RUN]
    assert [name for name in set(names) if names.count(name) > 1] == []
