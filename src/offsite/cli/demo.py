"""The verb demo, which plays both parties on one machine."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite.cli import terminal
from offsite.cli.show_gains import gain_sentences

if TYPE_CHECKING:
    from rich.table import Table

    from offsite.progress import Event
    from offsite.study.demos.language_demo import Demo
    from offsite.study.demos.vision_demo import VisionDemo

_FULL = "Full fine-tuning: every block but one in the middle; embeddings, final norm and head stay frozen."


def demo(
    vision: Annotated[bool, typer.Option("--vision", help="images: an encoder, and a classifier tuned on it")] = False,
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="with --vision: pictures by class [default: handwritten digits]"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Python code to tune on [default: the standard library]")
    ] = None,
    workdir: Annotated[Path, typer.Option(metavar="FOLDER", help="where both parties have their folders")] = Path(
        "offsite-demo"
    ),
    model: Annotated[
        Path | None, typer.Option(metavar="PATH", help="base folder or .gguf [default: SmolLM2-135M-Instruct]")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="optimiser steps of every tuning")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="also tune the uncompressed model, which bounds the rest")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="also write the result as JSON to this file")
    ] = None,
) -> None:
    """Play both parties with a real model: every step of the protocol as the commands that each party would run.

    The first run downloads 93 MB (90 MB with --vision). It is safe to interrupt: the next run continues.

    Example:
      offsite demo --json result.json
    """
    from dataclasses import asdict

    from offsite.storage.files import replace_file

    _require_fitting(vision=vision, images=images, others={"--data": data, "--full": full or None})
    if vision:
        from offsite.study.demos.vision_demo import vision_demo

        seen = vision_demo(workdir, images, model=model, steps=steps, progress=_announce)
        if json_file is not None:
            replace_file(json_file, f"{terminal.render_json(asdict(seen))}\n".encode())
        _print_vision(seen, workdir, json_file)
        return
    from offsite.study.demos.language_demo import demo as run

    result = run(workdir, data=data, model=model, steps=steps, full=full, progress=_announce)
    if json_file is not None:
        replace_file(json_file, f"{terminal.render_json(asdict(result))}\n".encode())
    _print(result, workdir, json_file)


def _require_fitting(*, vision: bool, images: Path | None, others: Mapping[str, object]) -> None:
    """Check that no flag is given that belongs to the other demo.

    Args:
        vision: whether the vision demo runs.
        images: the value of --images.
        others: the flags of the language demo with their values; None: the flag was left out.

    Raises:
        UsageError: --images without --vision, or flags of the language demo with --vision.
    """
    from offsite.errors import UsageError

    if images is not None and not vision:
        raise UsageError("--images is for the demo on pictures", next_step="add --vision, or leave --images out")
    given = [name for name, value in others.items() if value is not None]
    if vision and given:
        raise UsageError(f"{', '.join(given)} cannot be used with --vision", next_step="leave one of them out")


def _print_vision(result: "VisionDemo", workdir: Path, json_file: Path | None) -> None:
    """Print the result of the vision demo on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(title=f"Accuracy on {result.task['test']} held-out pictures of {result.task['classes']} classes")
    table.add_column("model")
    for name in ("accuracy", "95 % interval", "gain, points", "loss"):
        table.add_column(name, justify="right")
    first = result.rows[0]["accuracy"]
    for row in result.rows:
        style = "bold green" if row["name"] == "plug-in" else ""
        ends = f"{row['low']:.1%} to {row['high']:.1%}" if row["low"] is not None else ""
        gap = "" if row is result.rows[0] else f"{100 * (row['accuracy'] - first):+.1f}"
        table.add_row(row["name"], f"{row['accuracy']:.1%}", ends, gap, f"{row['loss']:.3f}", style=style)
    console.print()
    console.print(table)
    console.print("Zero-shot rows: a linear probe on frozen features, fitted on the same training pictures.")
    for line in gain_sentences(result.gains, result.base_parameters, "accuracy", "`offsite study` runs it too"):
        console.print(line)
    sizes = "  ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in result.bytes.items())
    seconds = "  ".join(f"{name} {seconds:.0f}" for name, seconds in result.seconds.items() if seconds >= 1)
    for title, text in (
        ("Some held-out pictures, before and after", f"  {result.predictions}"),
        ("Sizes", sizes),
        ("Seconds", seconds),
        ("Where to look next", _next_steps(workdir, json_file)),
    ):
        console.print()
        console.print(f"[bold]{title}[/]")
        console.print(terminal.printable(text), markup=False)


def _announce(event: "Event") -> None:
    """Print the number and the description of the demo's next step on standard error."""
    of = f"[{event.done}/{event.total}]"
    typer.secho(f"\n{of} {event.facts['says']}", bold=True, err=True)


def _print(result: "Demo", workdir: Path, json_file: Path | None) -> None:
    """Print the result of the language demo on standard output."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print()
    console.print(_table(result))
    for line in gain_sentences(result.gains, result.base_parameters, "loss", "add --full"):
        console.print(line)
    if result.gains.full is not None:
        console.print(_FULL)
    sizes = "  ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in result.bytes.items())
    seconds = "  ".join(f"{name} {seconds:.0f}" for name, seconds in result.seconds.items() if seconds >= 1)
    sections = [*_sample(result.sample), ("Sizes", sizes), ("Seconds", seconds)]
    for title, text in [*sections, ("Where to look next", _next_steps(workdir, json_file))]:
        console.print()
        console.print(Text(title, style="bold"))
        console.print(Text(terminal.printable(text)))


def _table(result: "Demo") -> "Table":
    """The losses of all models as a table."""
    from rich.table import Table

    rows, modules = result.task["test_rows"], result.task["test_modules"]
    table = Table(title=f"Loss on {rows} held-out functions of {modules} modules (nats per token; lower is better)")
    gains = result.gains
    shares = {"plug-in": gains.gain_recovered, "emulator": gains.own_gain}  # of full fine-tuning's gain
    known = None not in shares.values()
    table.add_column("model")
    for name in ("loss", "perplexity", "against zero-shot", *(["share of gain"] if known else [])):
        table.add_column(name, justify="right")
    first = result.rows[0]["loss"]
    for row in result.rows:
        style = "bold green" if row["name"] == "plug-in" else ""
        gap = "" if row is result.rows[0] else f"{row['loss'] - first:+.3f}"
        perplexity = "inf" if row["perplexity"] is None else f"{row['perplexity']:.4g}"
        share = shares.get(row["name"])
        part = [] if not known else ["" if share is None else f"{100 * share:.0f} %"]
        table.add_row(row["name"], f"{row['loss']:.3f}", perplexity, gap, *part, style=style)
    return table


def _sample(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The example of the demo as pairs of title and text: the prompt, and the answers before and after."""
    if not sample:
        return []
    return [
        ("The first test row", sample["prompt"].rstrip()),
        ("Its docstring in the code", sample["reference"]),
        ("Before: the base model", sample["zero-shot"]),
        ("After: the plug-in", sample["plug-in"]),
    ]


def _next_steps(workdir: Path, json_file: Path | None) -> str:
    """The commands that a user may run after the demo, as text.

    `json_file` is the file with the result as JSON; None if none was written.
    """
    program = sys.argv[0] if Path(sys.argv[0]).name == "offsite" else "python -m offsite"
    tuner = workdir / "data-owner"
    inspect = f"  {program} --home {tuner / 'home'} inspect"
    lines = [
        "What the data owner received, and what it gave away:",
        f"{inspect} {tuner / 'bundle'}",
        f"{inspect} {tuner / 'return'}",
        "The settings, with the defaults that were used here:",
        f"  {program} pack --help",
        f"  {program} tune --help",
    ]
    if json_file is not None:
        lines += ["These numbers:", f"  {json_file}"]
    return "\n".join(lines)
