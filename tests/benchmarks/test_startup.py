"""The benchmark of start-up looks at every command that a user sees."""

import typer
from benchmarks.startup import VERBS

from offsite.cli.app import build


def test_every_verb_is_measured():
    commands = typer.main.get_command(build()).commands
    assert set(VERBS) == {name for name, command in commands.items() if not command.hidden}
