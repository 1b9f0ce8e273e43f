"""The commands for keys: keygen and trust."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offsite.cli import flags, terminal

if TYPE_CHECKING:
    from offsite.protocol.home import Home, Role
    from offsite.protocol.signing import PublicKey

_KEY_BYTES = 16 * 2**10  # no file of one public key is larger
_PublicKeyFile = Annotated[Path, typer.Argument(metavar="FILE", help="the public key that the other party sent")]
_Role = Annotated[
    str | None,
    typer.Option("--role", metavar="ROLE", help="model-owner or data-owner: what else the key signs is refused"),
]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="your name for that party")]


def keygen(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="where to write the public key")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="name of this party; makes the key pair")] = None,
    home: flags.HomeFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Make this party's Ed25519 key pair, and write its public key to a file for the other party.

    The private part stays in the home (mode 0600). Without --name the existing public key is written again.

    Example:
      offsite keygen --name acme --out acme.pub
    """
    from offsite.storage.files import replace_file

    own = flags.home_of(context, home)
    _require_writable(out, own)
    identity = own.create_identity(name) if name is not None else own.identity()
    replace_file(out, identity.public_key.openssh(identity.name).encode())
    terminal.show(
        {
            "name": identity.name,
            "fingerprint": identity.public_key.fingerprint,
            "public_key": str(out),
            "home": str(own.folder),
        },
        as_json=as_json,
    )
    terminal.hint(f"send {out} to the other party, and read the fingerprint to them over another channel")
    terminal.hint_command("trust", "add", "NAME", "FILE.pub")


def _require_writable(out: Path, home: "Home") -> None:
    """Check that `out` is a new file or an old public key, so that keygen never overwrites a private key or other file.

    Raises:
        UsageError: `out` is another file, or a file of the home.
    """
    from offsite.errors import UsageError
    from offsite.protocol.output_place import require_outside

    own = out.resolve().parent == home.folder.resolve() and out.suffix != ".pub"
    if own or ((out.exists() or out.is_symlink()) and not _holds_key(out)):
        raise UsageError(
            f"{out} is the home's own" if own else f"{out} is not a public key",
            next_step="name another file with --out; nothing was written",
        )
    require_outside(out)


def _holds_key(file: Path) -> bool:
    """Whether a file is a public key."""
    from offsite.errors import UsageError

    try:
        _read_key(file)
    except UsageError:
        return False
    return True


def trust_commands() -> typer.Typer:
    """Build the command group `offsite trust` with its commands add, list and remove."""
    app = typer.Typer(help="Trust another party's public key, list those trusted, or forget one.", no_args_is_help=True)
    for name, verb in (("add", add), ("list", list_), ("remove", remove)):
        app.command(name, cls=flags.Command, epilog=flags.EXIT_CODES)(verb)
    return app


def add(
    context: typer.Context,
    name: _Name,
    file: _PublicKeyFile,
    role: _Role = None,
    home: flags.HomeFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Trust a party's key under a name of your own; compare the fingerprint over another channel.

    With --role the key may sign only what that party makes: a model-owner bundles and plug-ins, a data-owner returns.

    Example:
      offsite trust add hospital hospital.pub --role data-owner
    """
    key, own = _read_key(file), flags.home_of(context, home)
    own.trust(name, key, _role(role))
    terminal.show({"name": name, "fingerprint": key.fingerprint, "role": own.roles()[key.hex]}, as_json=as_json)
    terminal.hint_command("pack", "base/", "--out", "bundle/", "--for", name)
    terminal.hint(f"or, with a bundle of {name}: offsite verify bundle/")


def _role(word: str | None) -> "Role | None":
    """The value of --role.

    Raises:
        UsageError: there is no such role.
    """
    if word is None:
        return None
    if word == "model-owner":
        return "model-owner"
    if word == "data-owner":
        return "data-owner"
    from offsite.errors import UsageError

    raise UsageError(f"there is no role {word[:40]!r}", next_step="give --role model-owner or --role data-owner")


def _read_key(file: Path) -> "PublicKey":
    """Read a public key from a file.

    Raises:
        UsageError: the file cannot be read, or is no public key.
    """
    from offsite.encodings import decode_text
    from offsite.errors import UsageError
    from offsite.protocol.signing import PublicKey

    try:
        with file.open("rb") as stream:
            line = decode_text(stream.read(_KEY_BYTES + 1))
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"cannot read the public key {file}",
            reasons=[str(error)],
            next_step="name the file that the other party made with `offsite keygen --name NAME --out FILE.pub`",
        ) from None
    return PublicKey.from_openssh(line)


def list_(context: typer.Context, home: flags.HomeFlag = None, as_json: flags.JsonFlag = False) -> None:
    """List the parties that are trusted, with the fingerprints of their keys.

    Example:
      offsite trust list
    """
    own = flags.home_of(context, home)
    trusted, roles = own.trusted(), own.roles()
    rows = [{"name": name, "fingerprint": key.fingerprint, "role": roles[key.hex]} for name, key in trusted.items()]
    if as_json:
        terminal.show({"trusted": rows}, as_json=True)
    elif rows:
        terminal.show({str(row["name"]): " ".join(filter(None, (row["fingerprint"], row["role"]))) for row in rows})
        terminal.hint_command("pack", "base/", "--out", "bundle/", "--for", str(rows[0]["name"]))
    else:
        terminal.hint("nobody is trusted yet: `offsite trust add NAME FILE.pub`")


def remove(context: typer.Context, name: _Name, home: flags.HomeFlag = None, as_json: flags.JsonFlag = False) -> None:
    """Forget a party's key: artifacts that it signed no longer verify here.

    Example:
      offsite trust remove hospital
    """
    flags.home_of(context, home).distrust(name)
    terminal.show({"removed": name}, as_json=as_json)
    terminal.hint_command("trust", "list")
