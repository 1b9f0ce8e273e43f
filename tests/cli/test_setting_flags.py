"""A command's flags come from its spec's fields."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from offsite.cli import setting_flags
from offsite.config import Settings, Spec
from offsite.config.spec import FILE_ONLY


class Baking(Settings):
    heat: Annotated[int | None, Field(description="degrees")] = None
    kind: Annotated[Literal["rye", "wheat"], Field(description="which flour")] = "rye"
    hours: Annotated[tuple[float, ...], Field(description="of each rest")] = (1.0, 2.0)
    covered: Annotated[bool, Field(description="with a lid")] = False
    notes: Annotated[Path | None, Field(description="where they lie")] = None
    hidden: Annotated[float, Field(description="in a file"), FILE_ONLY] = 0.5


class BreadSpec(Spec):
    baking: Baking = Baking()
    as_: Annotated[str | None, Field(alias="as", description="a word of Python")] = None


def run(*words: str) -> tuple[dict[str, Any], str]:
    seen: dict[str, Any] = {}

    def bake(
        flag_values: setting_flags.FlagValues, oven: str, loud: Annotated[bool, typer.Option("--loud")] = False
    ) -> None:
        """Bake a bread."""
        seen.update(flag_values, oven=oven, loud=loud)

    app = typer.Typer(add_completion=False)
    app.command()(setting_flags.with_flags(bake, BreadSpec))
    result = CliRunner().invoke(app, words, terminal_width=200)
    assert result.exit_code == 0, result.output
    return seen, " ".join(result.output.split())


def test_what_is_left_out_is_none() -> None:
    left_out = dict.fromkeys(("heat", "kind", "hours", "covered", "notes", "as"))
    assert run("o")[0] == {**left_out, "oven": "o", "loud": False}


def test_values_have_the_fields_types() -> None:
    words = ["--heat", "3", "--kind", "wheat", "--hours", "1,2", "--covered", "--notes", "n", "--as", "x", "--loud"]
    assert run("o", *words)[0] == {
        "heat": 3, "kind": "wheat", "hours": "1,2", "covered": True, "notes": Path("n"), "as": "x",
        "oven": "o", "loud": True,
    }  # fmt: skip
    assert run("o", "--no-covered")[0]["covered"] is False


@pytest.mark.parametrize("says", ["degrees", "rye|wheat", "which flour (default rye)", "(default 1.0, 2.0)"])
def test_help_is_the_fields(says: str) -> None:
    shown = run("--help")[1]
    assert says in shown
    assert "hidden" not in shown


def test_what_has_no_flag_is_named_with_its_default() -> None:
    assert setting_flags.further_settings("bake", BreadSpec).endswith("table bake of a --config file: hidden (0.5)")


def test_a_command_without_flags_keeps_its_own_parameters() -> None:
    def bake(flag_values: setting_flags.FlagValues, oven: str) -> None:
        """Bake a bread."""

    command = setting_flags.with_flags(bake, None)
    assert list(command.__signature__.parameters) == ["oven"]  # type: ignore[attr-defined]
    assert command.__doc__ == "Bake a bread."
