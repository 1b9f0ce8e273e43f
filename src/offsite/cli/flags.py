"""What the commands share: flags, the state of one run, and help that reads its defaults from the specs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperOption

from offsite.training.run_log import run_folder

if TYPE_CHECKING:
    from offsite.config import Spec
    from offsite.protocol.home import Home

    S = TypeVar("S", bound=Spec)

MODEL = "I own a model"
DATA = "I own data"
BOTH = "Both"
SETTINGS = "Settings"

EXIT_CODES = (
    "Exit codes: 0 done; 1 disk or environment; 2 wrong flag, setting or data; 3 verification failed; "
    "4 does not fit together; 5 refused by policy; 130 interrupted"
)


@dataclass
class Run:
    """What is known of the run of one command, for the case that it ends early."""

    verb: str = ""
    home: Path | None = None
    resumable: Path | None = None  # where its resume points would lie


def run_of(context: typer.Context) -> Run:
    """The state that `main` gave to the parser."""
    run: Run = context.find_root().obj
    return run


def _print_version(wanted: bool) -> None:
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
PlanFlag = Annotated[bool, typer.Option("--plan", help="print what it will do and need, and do nothing")]
VersionFlag = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
]
SKIP_BAD = typer.Option("--skip-bad", help="leave out pictures that cannot be read")
SETTING = typer.Option(rich_help_panel=SETTINGS)  # help, default and choices come from the spec


_WIDEST_CHOICES = 32  # letters of choices that fit beside the flags; more of them stand in the text


class Command(TyperCommand):
    """A command whose help is completed from the spec of its settings, and only when somebody asks for help."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, after noting where it could be resumed from."""
        if "resume" in ctx.params:
            run_of(ctx).resumable = run_folder(ctx.params["out"])
        return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, with defaults and choices as the spec has them now."""
        self._complete()
        super().format_help(ctx, formatter)

    def _complete(self) -> None:
        from offsite.config import TABLES

        spec = TABLES.get(self.name or "")
        if spec is None:
            return
        fields = {key: setting.field for key, setting in spec.settings().items()}
        for param in self.params:
            if not isinstance(param, TyperOption) or param.rich_help_panel != SETTINGS:
                continue
            field = fields.pop(str(param.opts[0]).removeprefix("--").replace("-", "_"))
            default = "" if field.default in (None, False) else f" [dim](default {_shown(field.default)})[/]"
            choices = "|".join(_choices(field.annotation))
            wide = len(choices) > _WIDEST_CHOICES
            named = f": {', '.join(_choices(field.annotation))}" if wide else ""
            param.help = f"{field.description}{named}{default}"
            param.metavar = "<choice>" if wide else choices or param.metavar
        more = ", ".join(f"{name} ({_shown(field.default)})" for name, field in fields.items())
        if more:
            self.epilog = f"Further settings, in table {self.name} of a --config file: {more}\n\n{EXIT_CODES}"


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return ", ".join(str(part) for part in default)
    return "none" if default is None else str(default)


def _choices(annotation: Any) -> tuple[str, ...]:
    """The words of a Literal, also inside a union with None."""
    from typing import Literal, get_args, get_origin

    if get_origin(annotation) is Literal:
        return tuple(str(choice) for choice in get_args(annotation))
    for part in get_args(annotation):
        if get_origin(part) is Literal:
            return _choices(part)
    return ()


def home_of(context: typer.Context, home: Path | None) -> "Home":
    """The home of this party: the verb's --home, else the one before the verb, else the default."""
    from offsite.protocol.home import Home

    folder = home or run_of(context).home
    return Home(folder) if folder else Home.default()


def settings(kind: "type[S]", config: Path | None, given: Mapping[str, object]) -> "S":
    """The settings of one stage; flags that were left out (None) leave the TOML file and the defaults in force."""
    from offsite.config import load_spec

    return load_spec(kind, given, config)
