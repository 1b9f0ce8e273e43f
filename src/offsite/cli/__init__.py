"""The command line: one file per party or concern, and the only place that catches errors and prints them.

Results go to standard output, as tables or with --json as JSON; progress, hints and errors go to standard error.
Everything heavy is imported inside the verbs, so that `offsite --help` answers at once.
"""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `offsite`; None takes those of the process.

    Returns:
        The exit code: 0, or that of the error (see `offsite.errors`), or 130 after Ctrl-C or SIGTERM.
    """
    # Looking for plugins, pydantic would read the metadata of every installed package at each start; we use none.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from offsite.cli.app import run  # in here, since Ctrl-C may come while it is imported

        return run(words)
    except KeyboardInterrupt:
        from offsite.cli import terminal

        return terminal.show_interruption(terminal.START_OVER, as_json="--json" in words)
    except OSError as error:  # a stream's, mostly: of files the stages make StorageErrors
        from offsite.cli import terminal

        return terminal.show_system_error(error, as_json="--json" in words)
