"""Who one is, and whom one trusts: keygen and trust."""

from pathlib import Path
from typing import Annotated

import typer

from offsite.cli import flags, terminal

_PublicKeyFile = Annotated[Path, typer.Argument(metavar="FILE", help="the public key that the other party sent")]
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
    from offsite.core.storage import replace_file

    own = flags.home_of(context, home)
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


def trust_commands() -> typer.Typer:
    """`offsite trust add|list|remove`."""
    app = typer.Typer(help="Trust another party's public key, list those trusted, or forget one.", no_args_is_help=True)
    for name, verb in (("add", add), ("list", list_), ("remove", remove)):
        app.command(name, cls=flags.Command, epilog=flags.EXIT_CODES)(verb)
    return app


def add(
    context: typer.Context,
    name: _Name,
    file: _PublicKeyFile,
    home: flags.HomeFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Trust a party's key under a name of your own; compare the fingerprint over another channel.

    Example:
      offsite trust add hospital hospital.pub
    """
    from offsite.errors import UsageError
    from offsite.exchange.signing import PublicKey

    try:
        line = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the public key {file}", reasons=[str(error)]) from None
    key = PublicKey.from_openssh(line)
    flags.home_of(context, home).trust(name, key)
    terminal.show({"name": name, "fingerprint": key.fingerprint}, as_json=as_json)


def list_(context: typer.Context, home: flags.HomeFlag = None, as_json: flags.JsonFlag = False) -> None:
    """List the parties that are trusted, with the fingerprints of their keys.

    Example:
      offsite trust list
    """
    trusted = flags.home_of(context, home).trusted()
    rows = [{"name": name, "fingerprint": key.fingerprint} for name, key in trusted.items()]
    if as_json:
        terminal.show({"trusted": rows}, as_json=True)
    elif rows:
        terminal.show({row["name"]: row["fingerprint"] for row in rows})
    else:
        terminal.hint("nobody is trusted yet: `offsite trust add NAME FILE.pub`")


def remove(context: typer.Context, name: _Name, home: flags.HomeFlag = None, as_json: flags.JsonFlag = False) -> None:
    """Forget a party's key: what it signed no longer verifies here.

    Example:
      offsite trust remove hospital
    """
    flags.home_of(context, home).distrust(name)
    terminal.show({"removed": name}, as_json=as_json)
