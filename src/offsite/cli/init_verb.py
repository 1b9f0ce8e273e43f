"""The command init, which makes a party's key and a settings file to start from."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offsite.cli import flags, terminal

if TYPE_CHECKING:
    from offsite.cli.starter_file import Party
    from offsite.protocol.home import Home
    from offsite.protocol.signing import Identity

_NEXT = {
    "owner": (
        "send {key} to the data owner, and read the fingerprint to them over another channel",
        "trust their key: `offsite trust add THEIR_NAME THEIRS.pub`",
        "make a base folder: `offsite import MODEL --out base/`",
        "pack it: `offsite pack base/ --out bundle/ --for THEIR_NAME --config {settings}`",
    ),
    "data": (
        "send {key} to the model's owner, and read the fingerprint to them over another channel",
        "trust their key: `offsite trust add THEIR_NAME THEIRS.pub`",
        "look at your rows as the model reads them: `offsite tune bundle/ --data train.jsonl --check`",
        "tune: `offsite tune bundle/ --data train.jsonl --out return/ --config {settings}`",
    ),
}


def init(
    context: typer.Context,
    owner: Annotated[str | None, typer.Option(metavar="NAME", help="you own a model; your name for this party")] = None,
    data: Annotated[str | None, typer.Option(metavar="NAME", help="you own data; your name for this party")] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="where to write public key and settings file")
    ] = Path(),
    home: flags.HomeFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Start as one of the two parties: make a key, and write a commented settings file.

    The private key goes to the home, NAME.pub and offsite.toml to --out. Nothing is overwritten: a home that has a key
    keeps it, and a file that is there already is an error.

    Example:
      offsite init --owner acme
    """
    from offsite.errors import UsageError
    from offsite.storage.files import replace_file

    if (owner is None) == (data is None):
        raise UsageError(
            "init is for one of the two parties",
            next_step="give one of `offsite init --owner NAME` (you own a model) and `offsite init --data NAME`",
        )
    party: Party = "owner" if owner is not None else "data"
    from offsite.cli.starter_file import STARTER_FILE, render_starter_file

    own = flags.home_of(context, home)
    public_key, settings_file = out / f"{owner or data}.pub", out / STARTER_FILE
    _require_free(public_key, settings_file)
    made = not own.has_identity
    identity = _identity(own, owner if owner is not None else str(data))
    replace_file(public_key, identity.public_key.openssh(identity.name).encode())
    replace_file(settings_file, render_starter_file(party).encode())
    steps = [line.format(key=_quoted(public_key), settings=_quoted(settings_file)) for line in _NEXT[party]]
    facts = {
        "party": {"owner": "owner of a model", "data": "owner of data"}[party],
        "name": identity.name,
        "fingerprint": identity.public_key.fingerprint,
        "key_made": made,
        "home": str(own.folder),
        "public_key": str(public_key),
        "settings": str(settings_file),
        "next": steps,
    }
    terminal.show(facts, as_json=as_json)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _require_free(*files: Path) -> None:
    """Check that no file that init writes exists, and that none would be inside a bundle, a model or a run.

    Raises:
        UsageError: a file exists, or is inside such a folder.
    """
    from offsite.errors import UsageError
    from offsite.protocol.output_place import require_outside

    there = [file for file in files if file.exists() or file.is_symlink()]
    if there:
        raise UsageError(
            f"{' and '.join(str(file) for file in there)} exist{'s' if len(there) == 1 else ''} already",
            next_step="name another folder with --out; nothing was written",
        )
    for file in files:
        require_outside(file)


def _identity(home: "Home", name: str) -> "Identity":
    """The key of a home: the one that it has if it is called `name`, or a new one.

    Raises:
        UsageError: the name is not valid for a party, or the home has a key under another name.
    """
    if home.has_identity and home.identity().name == name:
        return home.identity()
    return home.create_identity(name)
