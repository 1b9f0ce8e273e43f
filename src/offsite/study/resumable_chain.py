"""A chain of steps that is safe to interrupt: a step is not repeated while it and all earlier steps are unchanged.

A JSON file records which steps are done. The commands of the two parties run in their own processes.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offsite.errors import UsageError
from offsite.progress import Event, Progress
from offsite.protocol.output_place import require_outside
from offsite.storage.files import replace_file, staged_folder
from offsite.storage.leftovers import is_leftover
from offsite.study.run_command import run_command, settings_toml

STATE = "stages.json"
OWNER, TUNER = "model-owner", "data-owner"  # names of the parties, and of their folders


@dataclass
class Chain:
    """A chain of steps in one work folder, and the results and run times of the steps that are done."""

    workdir: Path
    progress: Progress
    total: int
    basis: str = ""  # digest of values that every step depends on
    results: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _key: str = ""  # digest of this step and of all earlier ones
    _done: int = 0

    def __post_init__(self) -> None:
        self._key = self.basis

    def folder(self, *parts: str) -> Path:
        """A path in the work folder."""
        return self.workdir.joinpath(*parts)

    def write_config(self, **settings: str) -> Path:
        """Write settings that tuning and scoring share to the data owner's TOML file, and return its path."""
        path = self.folder(TUNER, "settings.toml")
        content = settings_toml({"tune": settings, "eval": settings})
        if not path.exists() or path.read_bytes() != content:
            replace_file(path, content)
        return path

    def command(
        self,
        name: str,
        description: str,
        verb: Sequence[str | Path],
        out: Path | None = None,
        stamp: Mapping[str, Any] | None = None,
        *,
        again: str | None = None,
        leftovers: Sequence[Path] = (),
        by: str | None = None,
    ) -> Any:
        """Run an `offsite` command of a party as the next step, unless it is done, and return its JSON result.

        Args:
            name: the step's name, unique in the chain.
            description: a description of the step for the user.
            verb: the command's words, without `offsite` and --home.
            out: the folder or file that the command writes.
            stamp: values that the result depends on, in addition to the command's words and the earlier steps.
            again: a flag that is added if the step was started before.
            leftovers: files that an interrupted try leaves; they are removed if the step has changed since.
            by: the party that runs the command; None: the party whose folder contains `out`, or the model owner if
                there is no `out`.
        """
        party = (OWNER if out is None or out.is_relative_to(self.folder(OWNER)) else TUNER) if by is None else by

        def act(started: bool) -> Any:
            more = [again] if again and started else []
            return self.run(["--home", self.folder(party, "home"), *verb, *more])

        key = {"verb": [str(word) for word in verb], **(stamp or {})}
        return self._step(name, description, act, [out] if out else [], key, leftovers)

    def step(
        self, name: str, description: str, act: Callable[[], Any], outputs: Sequence[Path], stamp: Mapping[str, Any]
    ) -> Any:
        """Run a function as the next step, unless the step is done, and return its result.

        Args:
            name: the step's name, unique in the chain.
            description: a description of the step for the user.
            act: the function; its result is saved as JSON.
            outputs: the paths that it writes; if one is missing, the step runs again.
            stamp: values that the result depends on, in addition to the earlier steps.
        """
        return self._step(name, description, lambda _started: act(), outputs, stamp)

    def copy(self, name: str, source: Path, target: Path) -> None:
        """Copy a file or folder from one party to the other as the next step."""

        def act() -> dict[str, Any]:
            copy_artifact(source, target)
            return {}

        self.step(name, f"{name}: a plain copy", act, [target], {"source": str(source)})

    def note(self, name: str, stamp: Mapping[str, Any], result: Any, seconds: float) -> None:
        """Record the result of a step that was done outside this chain, so that later steps depend on it.

        Args:
            name: the step's name, unique in the chain.
            stamp: values that the result depends on.
            result: the result, as a value that JSON can hold.
            seconds: how long the step took.
        """
        self._done += 1
        self._key = _digest(self._key, name, stamp)
        self.results[name], self.seconds[name] = result, seconds

    def announce(self, name: str, description: str) -> None:
        """Report the step that starts now."""
        self.progress(Event(name, self._done + 1, self.total, {"says": description}))

    def _step(
        self,
        name: str,
        description: str,
        act: Callable[[bool], Any],
        outputs: Sequence[Path],
        stamp: Mapping[str, Any],
        leftovers: Sequence[Path] = (),
    ) -> Any:
        """Run the function of a step and return its result; if the step is already done, return the saved result.

        `act` is called with True if the step was started before. The other arguments are as for `command` and `step`.
        """
        self._key = _digest(self._key, name, stamp)
        record = self._state().get(name, {})
        same = record.get("key") == self._key
        if same and record.get("done") and all(path.exists() for path in outputs):
            self._done += 1
            self.results[name], self.seconds[name] = record["result"], record["seconds"]
            return record["result"]
        self.announce(name, description)
        for path in (*outputs, *(() if same else leftovers)):
            remove(path)
        self._write(name, {"key": self._key, "done": False})
        started = time.monotonic()
        result = act(bool(record))
        seconds = round(time.monotonic() - started, 2)
        self._write(name, {"key": self._key, "done": True, "result": result, "seconds": seconds})
        self._done += 1
        self.results[name], self.seconds[name] = result, seconds
        return result

    def _state(self) -> dict[str, Any]:
        """The saved records of all steps, by name; {} if there are none."""
        try:
            state: dict[str, Any] = json.loads((self.workdir / STATE).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return state

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        """Save the record of one step, in addition to those of the others."""
        replace_file(self.workdir / STATE, json.dumps(self._state() | {name: record}, indent=1).encode())

    def run(self, words: Sequence[str | Path]) -> Any:
        """Run one `offsite` command and return its JSON result; its progress goes to our standard error.

        Raises:
            OffsiteError: the command failed; it has the command's exit code, and the message was printed already.
        """
        return run_command(words, "the demo").result


def copy_artifact(source: Path, target: Path) -> None:
    """Copy a file or a folder; the copy appears complete or not at all."""
    if source.is_dir():
        with staged_folder(target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
    else:
        replace_file(target, source.read_bytes())


def require_demo_folder(workdir: Path) -> Path:
    """Return `workdir` if it is empty, new, or contains an earlier run of the demo.

    Raises:
        UsageError: it contains other files, or is inside a model or an artifact.
    """
    require_outside(workdir, flag="--workdir")
    if workdir.is_dir() and _holds_something(workdir) and not (workdir / STATE).exists():
        raise UsageError(
            f"{workdir} contains files that are not of a demo",
            reasons=[f"it has no {STATE}"],
            next_step="name a new folder with --workdir; nothing was changed",
        )
    return workdir


def _holds_something(folder: Path) -> bool:
    """Whether a folder has any file that is not left over from an interrupted write."""
    return any(not is_leftover(path.name) for path in folder.iterdir())


def _digest(before: str, name: str, stamp: Mapping[str, Any]) -> str:
    """The digest of a step: of the digest of the steps before it, its name, and its stamp."""
    return hashlib.sha256(json.dumps([before, name, stamp], sort_keys=True, default=str).encode()).hexdigest()


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
