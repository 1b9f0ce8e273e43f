"""A folder with what commands name, and the form of a case: an error, and what is done as its next step advises."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts import edit_json
from tiny import Parties


@dataclass(frozen=True)
class World:
    """A folder with everything that a command may name."""

    folder: Path
    parties: Parties

    def words(self, text: str) -> list[str]:
        """A command line, with {folder}, and with the homes as {owner} and {tuner}."""
        owner, tuner = self.parties.owner.folder, self.parties.data_owner.folder
        return [word.format(folder=self.folder, owner=owner, tuner=tuner) for word in shlex.split(text)]


Mend = Callable[[World, str], "str | None"]  # what the error advises, done; may give other words for the command
Spoil = Callable[[World], None]


@dataclass(frozen=True)
class Case:
    """An error, and what is done about it."""

    name: str
    file: str  # in the package, where the error is made
    command: str
    says: str  # a part of the next step, as it is in the source
    mend: Mend
    spoil: Spoil = lambda world: None


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
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-c", command[1]], check=True, cwd=world.folder, env={**os.environ, "PATH": path})


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
