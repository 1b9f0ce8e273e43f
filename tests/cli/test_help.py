import ast
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer

import offsite
from offsite.cli import flags, main, setting_flags
from offsite.cli.app import build
from offsite.config import TABLES, Spec
from offsite.training.run_log import log_file

VERBS = (
    "import",
    "pack",
    "plug-in",
    "tune",
    "keygen",
    "inspect",
    "verify",
    "eval",
    "compare",
    "doctor",
    "demo",
    "study",
)


def command(name: str) -> Any:
    group: Any = typer.main.get_command(build())
    return group.commands[name]


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words, "--help"]) == 0
    out = capsys.readouterr().out
    return re.sub(r"[\s│]+", " ", out)


def test_help_groups_verbs_by_party(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    places = [out.index(panel) for panel in (flags.MODEL, flags.DATA, flags.BOTH)]
    assert places == sorted(places)
    assert out.index("─ I own a model") < out.index(" pack ") < out.index("─ I own data") < out.index(" tune ")
    assert all(f" {verb} " in out for verb in (*VERBS, "models", "trust", "audit"))


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, verb)
    assert "Example: offsite " + verb in text
    assert "Exit codes: 0 done;" in text
    assert "130 interrupted" in text


@pytest.mark.parametrize("verb", ["pack", "tune"])
def test_help_names_the_log(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert log_file(Path("OUT")).name in help_of(capsys, verb)


def test_tables_of_a_recipe_are_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the grid: bases, data, [[pack]], [[tune]]" in help_of(capsys, "study")


@pytest.mark.parametrize("verb", ["add", "list", "remove"])
def test_help_of_trust_teaches(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"Example: offsite trust {verb}" in help_of(capsys, "trust", verb)


def test_help_of_models_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Example: offsite models" in help_of(capsys, "models")
    assert "Example: offsite models get smollm2" in help_of(capsys, "models", "get")


@pytest.mark.parametrize(("verb", "spec"), TABLES.items())
def test_every_setting_is_shown_with_its_default(
    verb: str, spec: type[Spec], capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(capsys, verb)
    for shown, field in ((key, setting.field) for key, setting in spec.settings().items()):
        default = setting_flags.shown(field.default)
        if f"--{shown.replace('_', '-')} " in text:
            assert field.default in (None, False) or f"(default {default})" in text
            choices = [str(choice) for choice in _literal(field.annotation)]
            assert not choices or "|".join(choices) in text or ", ".join(choices) in text
        else:
            assert f"{shown} ({default})" in text


def _literal(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((get_args(part) for part in get_args(annotation) if get_origin(part) is Literal), ())


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("import", {"out", "config", "json"}),
        (
            "pack",
            {
                "out", "for", "placement", "bottom", "top", "train", "keep", "select", "drop-from", "search-minutes",
                "heal", "heal-minutes",
                "distill-tokens", "distill-epochs", "distill-steps", "distill-lr", "distill-ce",
                "prune", "prune-by", "zeros", "bits",
                "group", "svd-rank", "mlp-width", "narrow", "narrow-by", "narrow-heads", "narrow-neurons",
                "narrow-experts",
                "narrow-widths",
                "calibration", "columns", "chosen", "permit-head",
                "seed", "device", "dtype", "resume", "score", "plan", "config", "home", "json",
            },
        ),
        (
            "tune",
            {
                "data", "out", "eval-data", "tensorboard", "method", "rank", "width", "lr", "epochs", "max-steps",
                "batch-size", "tune-head", "checkpoints", "report-scores", "memory", "shard", "gradient-checkpointing",
                "max-length", "long-rows", "seed", "device",
                "skip-bad", "resume", "plan", "check", "columns", "chosen", "config", "home", "json",
            },
        ),
        (
            "plug-in",
            {
                "out", "as", "choose-on", "eval-data", "checkpoint", "strength", "strengths", "whole", "again",
                "columns", "chosen", "plan", "config", "home", "json",
            },
        ),
        (
            "eval",
            {
                "max-length", "long-rows", "max-rows", "device",
                "adapter", "data", "probe", "skip-bad", "samples", "tasks", "tasks-path", "row-scores", "check",
                "columns", "chosen", "config", "home", "json",
            },
        ),
        (
            "compare",
            {
                "max-length", "long-rows", "max-rows", "device",
                "data", "probe", "rows", "show-rows", "skip-bad", "columns", "chosen", "config", "home", "json",
            },
        ),
        ("inspect", {"for", "home", "json"}),
        ("verify", {"home", "json"}),
        ("init", {"owner", "data", "out", "home", "json"}),
        ("keygen", {"name", "out", "home", "json"}),
        ("generate", {"prompt", "max-tokens", "temperature", "seed", "raw", "home", "config", "json"}),
        ("chat", {"max-tokens", "temperature", "seed", "raw", "home", "config", "json"}),
        ("doctor", {"quick", "home", "json"}),
        ("study", {"out", "data-root", "base", "check", "report-only", "json"}),
        ("demo", {"full", "data", "images", "vision", "model", "workdir", "steps", "json"}),
    ],
)  # fmt: skip
def test_flags_are_those_that_are_documented(verb: str, expected: set[str]) -> None:
    found = {opt.removeprefix("--") for param in command(verb).params for opt in param.opts if opt.startswith("--")}
    assert found == expected


def test_every_flag_that_a_message_names_is_there() -> None:
    """Sentences of the sources, which errors, hints and help are made of; a page's style sheet is none."""

    def flags_of(command: Any) -> set[str]:
        own = {opt for param in command.params for opt in param.opts if opt.startswith("--")}
        return own.union(*(flags_of(inner) for inner in getattr(command, "commands", {}).values()))

    foreign = {
        "--repo-type",
        "--local-dir",
        "--merge",
        "--safe",
        "--index-url",
        "--nproc-per-node",
        "--max-lora-rank",
        "--lora-modules",
        "--lora-dtype",
    }  # of other programs, which errors advise to run
    there = {"--help"} | foreign | flags_of(typer.main.get_command(build()))
    wrong = [
        f"{file.name}:{node.lineno}: {flag}"
        for file in Path(offsite.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if " " in node.value and not node.value.startswith("<")
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", node.value)
        if flag not in there
    ]
    assert not wrong


def test_flags_left_out_are_not_given() -> None:
    """None means that the TOML file and the spec decide."""
    for verb in TABLES:
        settings = [p for p in command(verb).params if getattr(p, "rich_help_panel", "") == setting_flags.PANEL]
        assert all(param.default is None for param in settings)


def test_no_words_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "I own a model" in captured.out + captured.err
    assert "error:" not in captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"offsite {offsite.__version__}\n"
