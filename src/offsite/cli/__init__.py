"""The command line, with one file for each group of commands; only this folder catches errors and prints.

Results go to standard output, as tables or with --json as JSON; progress, hints and errors go to standard error.
Modules that are slow to import are imported inside the commands, so that `offsite --help` answers at once.
"""

import os
import sys
from collections.abc import Sequence

_LESS = "close other programs, or see what the command needs with --plan; a small file that asks for much is suspicious"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `offsite`; None means the arguments of this process.

    Returns:
        The exit code: 0, the error's exit code (see `offsite.errors`), or 130 after Ctrl-C or SIGTERM.
    """
    # To find plugins, pydantic would read the metadata of every installed package at each start; we use no plugins.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from offsite.cli.app import run  # inside `try`, since Ctrl-C may come during the import

        return run(words)
    except KeyboardInterrupt:
        from offsite.cli import terminal

        return terminal.show_interruption(terminal.START_OVER, as_json="--json" in words)
    except MemoryError as error:
        from offsite.cli import terminal
        from offsite.errors import OffsiteError

        what = OffsiteError(
            "there is not enough memory", reasons=[str(error)[:200]] if str(error) else (), next_step=_LESS
        )
        terminal.show_error(what, as_json="--json" in words)
        return what.exit_code
    except OSError as error:  # mostly of standard output or error, as the stages turn errors of files into StorageError
        from offsite.cli import terminal

        return terminal.show_system_error(error, as_json="--json" in words)
