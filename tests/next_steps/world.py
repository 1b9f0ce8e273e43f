"""A folder with what commands name, and the form of a case: an error, and what is done as its next step advises."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from artifacts import edit_json
from next_steps.sites import GAP, Site, sites
from offsite.cli import main
from offsite.errors import OffsiteError
from tiny import Parties


@dataclass(frozen=True)
class World:
    """A folder with everything that a command may name; `patch` is for what a test machine does not have."""

    folder: Path
    parties: Parties
    patch: pytest.MonkeyPatch = field(default_factory=pytest.MonkeyPatch)

    def words(self, text: str) -> list[str]:
        """A command line, with {folder}, and with the homes as {owner} and {tuner}."""
        owner, tuner = self.parties.owner.folder, self.parties.data_owner.folder
        return [word.format(folder=self.folder, owner=owner, tuner=tuner) for word in shlex.split(text)]


Command = str | Callable[[World], object]  # the words after `offsite`, or a call of a function of the package
Mend = Callable[[World, str], Command | None]  # does what the error advises; may give another command
Spoil = Callable[[World], object]


@dataclass(frozen=True)
class Case:
    """An error, and what is done about it."""

    name: str
    file: str  # in the package, where the error is made
    command: Command
    says: str  # a part of the next step, as it is in the source
    mend: Mend
    spoil: Spoil = lambda world: None
    what: str = ""  # a part of the error's first sentence, where a file has several errors with such a step
    worker: bool = False  # the error is made in a worker process, which sends it

    def sites(self) -> list[Site]:
        """The places in the source that this case may be about: one."""
        found = [
            site
            for site in sites()
            if site.file == self.file and any(self.what in what or what == GAP for what in site.whats)
        ]
        written = [site for site in found if any(self.says in step for step in site.steps)]
        return written or [site for site in found if any(set(step) == {GAP} for step in site.steps)]


def run(world: World, command: Command, capsys: pytest.CaptureFixture[str]) -> tuple[str, str] | None:
    """Run a command; returns the error's first sentence and its next step, or None where it works."""
    if callable(command):
        try:
            command(world)
        except OffsiteError as error:
            return error.what, str(error.next_step)
        return None
    capsys.readouterr()
    code = main([*world.words(command), "--json"])
    assert code != 130
    if code == 0:
        return None
    said = capsys.readouterr()
    if not re.match(r'\{\s*"error":', said.out):  # a study prints its results there, and its error as text
        return said.err, said.err.rpartition("Next: ")[2].strip()
    error = json.loads(said.out)["error"]
    return error["what"], error["next_step"]


QUICK = "--rank 2 --max-steps 2 --batch-size 4"
TUNE = f"tune {{folder}}/bundle --data {{folder}}/rows.jsonl --home {{tuner}} {QUICK}"
PACK = "pack {folder}/base --for hospital --home {owner} --bottom 1 --top 1 --keep 1 --heal none"
PLUG = "plug-in {folder}/base {folder}/return --home {owner}"
OUT = " --out {folder}/out"
EVAL = "eval {folder}/base --data {folder}/rows.jsonl"
IMPORT = "import {folder}/base --out {folder}/out"
# What each verb is given in addition when a step's own command is run.
_ALSO = {
    "tune": f"{QUICK} --home {{tuner}}",
    "plug-in": "--home {owner}",
    "eval": "--home {tuner}",
    "trust": "--home {owner}",
}
_OPEN = {
    "FILE": "{folder}/rows.jsonl", "BASE": "{folder}/base", "base/": "{folder}/base", "BUNDLE": "{folder}/bundle",
    "MODEL": "{folder}/base", "FILE.pub": "{folder}/hospital.pub",
}  # fmt: skip


def then(command: str) -> Mend:
    """The command that the step leads to."""
    return lambda world, step: command


def as_advised(world: World, step: str) -> str:
    """The `offsite` command in a step, word for word, with places of this world for those that it leaves open."""
    command = re.search(r"`offsite ([^`]*)`", step)
    assert command, step
    words = re.sub(r"--out \S+$", "--out {folder}/advised", command[1])
    for name, place in _OPEN.items():
        words = re.sub(rf"(?<!\S){re.escape(name)}(?!\S)", place, words)
    return f"{words} {_ALSO.get(words.split()[0], '')}"


def runs(world: World, step: str) -> None:
    """Run the shell command in a step: what is between backticks, or starts with the name of a program."""
    command = re.search(r"`([^`]+)`", step) or re.search(r"((?:rm|chmod|iconv) [^;]+)", step)
    assert command, step
    path = os.pathsep.join([str(world.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-c", command[1]], check=True, cwd=world.folder, env={**os.environ, "PATH": path})


def program(world: World, name: str, script: str) -> None:
    """What stands for a foreign program: a Python script that `runs` finds by its name."""
    file = world.folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!{sys.executable}\n{script}")
    file.chmod(0o755)


def file(name: str, content: str) -> Spoil:
    """Write a text file."""
    return lambda world: (world.folder / name).write_text(content) and None


def edited(name: str, **changes: Any) -> Spoil:
    """Change keys of a JSON file."""
    return lambda world: edit_json(world.folder / name, **changes)


def kept(*names: str) -> Spoil:
    """Move files of the base out of it; `restored` brings them back, as if they were fetched again."""

    def move(world: World) -> None:
        (world.folder / "kept").mkdir()
        for name in names:
            shutil.move(world.folder / "base" / name, world.folder / "kept" / name)

    return move


def restored(world: World, step: str) -> None:
    """Bring back what `kept` moved away."""
    for path in (world.folder / "kept").iterdir():
        (world.folder / "base" / path.name).unlink(missing_ok=True)
        shutil.copy(path, world.folder / "base" / path.name)
