"""Builds the command-line application from its commands, runs one command, and returns its exit code."""

import contextlib
import inspect
import os
import signal
from collections.abc import Callable, Iterator, Sequence

import typer

from offsite.cli import (
    audit,
    compare_verb,
    data_owner,
    demo,
    doctor_verb,
    eval_verb,
    flags,
    init_verb,
    inspect_verbs,
    keys,
    model_owner,
    models_verbs,
    setting_flags,
    study,
    talk_verbs,
    terminal,
)
from offsite.errors import OffsiteError, UsageError
from offsite.training.launcher import Place, read_place
from offsite.training.processes import Processes, joined
from offsite.training.run_log import terminated_as_interrupted

_SETTINGS_OF = {"compare": "eval"}  # commands that have the settings of another
_PLAYERS = {  # advice after an interruption, for the commands that play both parties
    "demo": "run the same command again: finished steps are not repeated",
    "study": "run the same command again: finished stages are not repeated",
}


def build(words: Sequence[str] | None = None) -> typer.Typer:
    """Build the application; its help lists the commands grouped by the party that uses them.

    Args:
        words: the words of the command line. Only commands that are among them get flags for their settings, because
            importing the specs takes longer than `offsite --help` may take. None: all commands get them.
    """
    app = typer.Typer(
        name="offsite",
        help=_ABOUT,
        epilog=flags.EXIT_CODES,
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for panel, name, verb in (
        (flags.MODEL, "import", model_owner.import_),
        (flags.MODEL, "pack", model_owner.pack),
        (flags.MODEL, "plug-in", model_owner.plug_in),
        (flags.DATA, "tune", data_owner.tune),
        (flags.BOTH, "init", init_verb.init),
        (flags.BOTH, "keygen", keys.keygen),
        (flags.BOTH, "inspect", inspect_verbs.inspect),
        (flags.BOTH, "verify", inspect_verbs.verify),
        (flags.BOTH, "eval", eval_verb.eval_),
        (flags.BOTH, "compare", compare_verb.compare),
        (flags.BOTH, "demo", demo.demo),
        (flags.BOTH, "generate", talk_verbs.generate),
        (flags.BOTH, "chat", talk_verbs.chat),
        (flags.BOTH, "doctor", doctor_verb.doctor),
        (flags.BOTH, "study", study.study),
    ):
        command, epilog = _with_settings(name, verb, words)
        app.command(name, rich_help_panel=panel, cls=flags.Command, epilog=epilog)(command)
    app.command("full-fine-tuning", hidden=True, epilog=flags.EXIT_CODES)(study.full_fine_tuning)  # only studies use it
    app.add_typer(models_verbs.models_commands(), name="models", rich_help_panel=flags.MODEL)
    app.add_typer(audit.audit_commands(), name="audit", rich_help_panel=flags.DATA)
    app.add_typer(keys.trust_commands(), name="trust", rich_help_panel=flags.BOTH)
    return app


def _with_settings(
    name: str, verb: Callable[..., None], words: Sequence[str] | None
) -> tuple[Callable[..., None], str]:
    """Add flags for a command's settings to its function; returns the new function, and the text below its help.

    Args:
        name: the name of the command.
        verb: its function.
        words: the words of the command line; None: flags are added even if the command is not among them.
    """
    if "flag_values" not in inspect.signature(verb).parameters:
        return verb, flags.EXIT_CODES
    if words is not None and name not in words:
        return setting_flags.with_flags(verb, None), flags.EXIT_CODES
    from offsite.config import TABLES

    table = _SETTINGS_OF.get(name, name)
    further = setting_flags.further_settings(table, TABLES[table])
    epilog = f"{further}\n\n{flags.EXIT_CODES}" if further else flags.EXIT_CODES
    return setting_flags.with_flags(verb, TABLES[table]), epilog


def run(words: Sequence[str]) -> int:
    """Run one command, and print the error if it fails; returns the exit code.

    Of several processes that a launcher started, the first one prints; an error is printed by one of them.
    """
    this = flags.Run()
    try:
        place = read_place(os.environ)
        with terminated_as_interrupted(), terminal.silent(place.rank > 0), _together(place, this):
            code = build(_completed_words() or words)(
                args=list(words), prog_name="offsite", standalone_mode=False, obj=this
            )
    except OffsiteError as error:
        with _reporting(this) as report:
            if report:
                terminal.show_error(error, as_json=_wants_json(words, this))
        return error.exit_code
    except typer.TyperException as error:  # a flag or argument that the parser refuses
        with _reporting(this) as report:
            if report:
                terminal.show_usage_error(error, words, as_json=_wants_json(words, this))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = terminal.INTERRUPTED
    if code == terminal.INTERRUPTED:  # the parser turns Ctrl-C into this code
        with _reporting(this) as report:
            if report:
                terminal.show_interruption(_after_interruption(this), as_json=_wants_json(words, this))
    return code if isinstance(code, int) else 0


def _completed_words() -> list[str]:
    """The words of the command line that the shell asks to complete; empty in a run of a command."""
    if "_OFFSITE_COMPLETE" not in os.environ:
        return []
    return (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "offsite").split()


@contextlib.contextmanager
def _together(place: Place, run: flags.Run) -> Iterator[None]:
    """Context manager: connects this process with the others that a launcher started, for its body."""

    def on_join(processes: Processes) -> None:
        run.processes = processes

    with joined(place, on_join):
        yield


@contextlib.contextmanager
def _reporting(run: flags.Run) -> Iterator[bool]:
    """Context manager: yields whether this process prints how the run ended: one of several does."""
    if run.processes.count == 1:
        yield True
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it as soon as another process has ended
    yield run.processes.claim_report()
    run.processes.end_report()


def _after_interruption(run: flags.Run) -> str:
    """The advice to print after an interruption: how to continue, or that the command must start again."""
    if run.verb in _PLAYERS:
        return _PLAYERS[run.verb]
    if run.resumable is not None and (run.resumable / "run.json").exists():
        return "run the same command with --resume to continue from the last resume point"
    return terminal.START_OVER


_ABOUT = (
    "Tune a model that you may not have on data that may not leave.\n\n"
    "The model's owner packs a bundle (the blocks to train, and a compressed stand-in for the rest) and sends it out. "
    "The data's owner tunes it at home and sends back the trained blocks alone. Plugged into the full model, they make "
    "it better at the task. Every artifact is signed and names its parent.\n\n"
    "Try it on this machine:  offsite demo"
)


def _root(
    context: typer.Context,
    home: flags.HomeFlag = None,
    version: flags.VersionFlag = False,
) -> None:
    run = flags.run_of(context)
    run.verb = context.invoked_subcommand or ""
    run.home = home
    if run.processes.count > 1 and run.verb != "tune":
        run.processes.agree_to_end()
        raise UsageError(
            f"{run.processes.count} processes were started, and `offsite {run.verb}` runs in one",
            next_step="start it without a launcher; only `offsite tune` runs in several processes",
        )


def _wants_json(words: Sequence[str], run: flags.Run) -> bool:
    """Whether errors are printed as JSON: with --json in `words`, except for `demo`, where --json names a file."""
    return "--json" in words and run.verb != "demo"  # the demo writes its JSON to a file
