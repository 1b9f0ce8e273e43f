"""The commands of the party that owns data which search what it received: audit traps."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite.cli import flags, terminal

if TYPE_CHECKING:
    from offsite.data_owner.audit_traps.findings import TrapAudit
    from offsite.protocol.artifacts import Bundle

SUSPICIOUS = 5  # the exit code of an audit that found something; that of a refusal by policy


def audit_commands() -> typer.Typer:
    """Build the command group `offsite audit` with its command traps."""
    app = typer.Typer(help="Search a received bundle for traps that would give your rows away.", no_args_is_help=True)
    app.callback()(_group)
    app.command("traps", cls=flags.Command, epilog=flags.EXIT_CODES)(traps)
    return app


def _group() -> None:
    """Search a received bundle for traps that would give your rows away."""


def traps(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="the folder that the model's owner sent")],
    quick: Annotated[bool, typer.Option("--quick", help="only the part that `offsite tune` runs by itself")] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="seed of the tokens; left out: a new one")
    ] = None,
    home: flags.HomeFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Search a bundle for weights that would write into the return which words stood in your rows.

    Weights are compared with those of the same layer and of other blocks, and random tokens are run through the
    trained blocks. Exits with 5 if anything was found. No finding is no proof that there is no trap.

    Example:
      offsite audit traps bundle/
    """
    from offsite.data_owner.audit_traps.trap_audit import audit_traps
    from offsite.progress import Event
    from offsite.protocol.verify import verify_bundle

    with terminal.showing_progress() as progress:
        progress(Event("verifying the bundle", 0))
        verified = verify_bundle(bundle, flags.home_of(context, home), hold=True)
        found = audit_traps(verified, quick=quick, seed=seed, progress=progress)
    words = _words(verified, found)
    if as_json:
        terminal.show({"kind": "audit", "path": str(bundle), **found.to_json(), "words": words}, as_json=True)
    else:
        shown = {"blocks": list(found.blocks), "matrices": found.matrices, "tokens or pictures": found.inputs}
        terminal.show({**shown, "seconds": found.seconds, "findings": len(found.findings)})
        for one in found.findings:
            typer.echo(terminal.printable(f"- {one.rule}: {one.sentence}"))
        if words:
            typer.echo(terminal.printable(f"the tokens are {', '.join(map(repr, words.values()))}"))
    if found.suspicious:
        terminal.hint(
            "next: do not tune it on rows that the model's owner may not know; ask the owner what this is for"
        )
        raise typer.Exit(SUSPICIOUS)
    terminal.hint(f"next: offsite tune {bundle} --data train.jsonl --out return/")


def _words(bundle: "Bundle", found: "TrapAudit") -> dict[str, str]:
    """The text of each token that a finding names, by its id."""
    ids = sorted({token for one in found.findings for token in one.tokens})
    if not ids:
        return {}
    from offsite.models.tokenizers import load_tokenizer

    tokenizer: Any = load_tokenizer(bundle.files)
    return {str(token): str(tokenizer.decode([token])) for token in ids}
