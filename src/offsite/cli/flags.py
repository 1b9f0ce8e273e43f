"""Flags that several commands share and that are not settings, and the state of one run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperOption

from offsite.training.processes import ONE, Processes
from offsite.training.run_log import run_folder

if TYPE_CHECKING:
    from offsite.config import Spec
    from offsite.protocol.home import Home

    S = TypeVar("S", bound=Spec)

MODEL = "I own a model"
DATA = "I own data"
BOTH = "Both"

EXIT_CODES = (
    "Exit codes: 0 done; 1 disk or environment; 2 wrong flag, setting or data; 3 verification failed; "
    "4 does not fit together; 5 refused by policy; 130 interrupted"
)


@dataclass
class Run:
    """The state of one run of a command, for the message if it is interrupted or fails."""

    verb: str = ""
    home: Path | None = None
    resumable: Path | None = None  # the folder of its resume points; None if it has none
    processes: Processes = ONE  # of which this one is one


def run_of(context: typer.Context) -> Run:
    """The state of this run, which `offsite.cli.app.run` passed to the parser."""
    run: Run = context.find_root().obj
    return run


def _print_version(wanted: bool) -> None:
    """Print the version and end the command, if --version was given (`wanted`)."""
    if wanted:
        import offsite

        typer.echo(f"offsite {offsite.__version__}")
        raise typer.Exit


HomeFlag = Annotated[
    Path | None,
    typer.Option("--home", metavar="FOLDER", help="keys, trusted keys and ledger [dim](else $OFFSITE_HOME)[/]"),
]
ConfigFlag = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file with settings; flags win over it")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="print the result as JSON on standard output")]
CheckFlag = Annotated[
    bool,
    typer.Option("--check", help="read all rows, print a summary and three examples, and do nothing else"),
]
DATA_OPTION = typer.Option(
    "--data", metavar="FILE", help="rows or pictures: a file, a folder or a 'pattern*'; several are joined"
)
PLAN_MODES = ("headers", "measure")
PlanFlag = Annotated[
    str | None,
    typer.Option(
        "--plan",
        metavar="[measure]",
        help="check, print what it will do and hold, and write nothing; `measure` also runs a small part of it",
    ),
]
VersionFlag = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
]


class Command(TyperCommand):
    """A typer command that records the folder of its resume points, and whose --plan may have no value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; before that, a `--plan` without a value gets its default value."""
        words = with_plan_mode(args)
        self._require_once(ctx, words)
        return super().parse_args(ctx, words)

    def _require_once(self, ctx: Any, words: list[str]) -> None:
        """Check that no option is given twice; the parser would ignore the first value without a message.

        Raises:
            UsageError: an option that takes one value is given twice.
        """
        found = self.make_parser(ctx).parse_args(args=list(words))[2]
        once = [option for option in found if isinstance(option, TyperOption) and not (option.multiple or option.count)]
        if twice := sorted({option.opts[0] for option in once if once.count(option) > 1}):
            from offsite.errors import UsageError

            raise UsageError(f"{' and '.join(twice)} was given twice", next_step="give it once")

    def invoke(self, ctx: Any) -> Any:
        """Record the folder of the resume points, then run the command.

        Paths of existing files are passed in the Unicode form in which the disk stores their names.
        """
        from offsite.storage.unicode_names import existing

        for name, value in ctx.params.items():
            if isinstance(value, Path):
                ctx.params[name] = existing(value)
            elif isinstance(value, list) and value and isinstance(value[0], Path):
                ctx.params[name] = [existing(path) for path in value]
        if "resume" in ctx.params:
            run_of(ctx).resumable = run_folder(out) if (out := ctx.params["out"]) is not None else None
        return super().invoke(ctx)


def with_plan_mode(words: Sequence[str]) -> list[str]:
    """Rewrite `--plan` as `--plan=headers` and `--plan measure` as `--plan=measure` in the words of a command line."""
    end = words.index("--") if "--" in words else len(words)
    found: list[str] = []
    for number, word in enumerate(words):
        if found and found[-1] == "--plan" and number <= end:
            given = number < end and word in PLAN_MODES
            found[-1] = f"--plan={word if given else PLAN_MODES[0]}"
            if given:
                continue
        found.append(word)
    return [*found[:-1], f"--plan={PLAN_MODES[0]}"] if found and found[-1] == "--plan" and end == len(words) else found


def measures(plan: str | None) -> bool:
    """Whether the value of --plan asks for measurements; None: the flag was left out.

    Raises:
        UsageError: the value is unknown.
    """
    if plan not in (None, *PLAN_MODES):
        from offsite.errors import UsageError

        raise UsageError(
            f"there is no --plan {str(plan)[:40]}",
            next_step="give --plan alone, or --plan measure, which runs a small part of the work",
        )
    return plan == PLAN_MODES[1]


def home_of(context: typer.Context, home: Path | None) -> "Home":
    """The home of this party: from --home after the command, else from --home before it, else the default home."""
    from offsite.protocol.home import Home

    folder = home or run_of(context).home
    return Home(folder) if folder else Home.default()


def settings(kind: "type[S]", config: Path | None, flag_values: Mapping[str, object]) -> "S":
    """Build a spec from flags and a TOML file; a flag that was left out (None) does not override file or default."""
    from offsite.config import load_spec

    return load_spec(kind, flag_values, config)
