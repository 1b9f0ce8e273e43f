"""How a plan is shown: what a stage will do and need, as tables or as JSON. Nothing here does any of it."""

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from offsite.cli import terminal

if TYPE_CHECKING:
    from offsite.data_owner.plan import TunePlan
    from offsite.kernels.memory_formulas import Part, Phase, Term
    from offsite.model_owner.plan import PackPlan, PlugInPlan

    Plan = PackPlan | PlugInPlan | TunePlan


def show_plan(plan: "Plan", out: Path, *, as_json: bool) -> None:
    """Print a plan on standard output.

    Args:
        plan: of any stage.
        out: the folder that the stage would make; only the room on its disk is looked at.
        as_json: as JSON, with every number in bytes.
    """
    free = _free(out)
    if as_json:
        terminal.show({**facts(plan), "disk_free_bytes": free}, as_json=True)
        return
    for line in lines(plan, free):
        typer.echo(terminal.printable(line))


def facts(plan: "Plan") -> dict[str, Any]:
    """A plan in words and numbers that JSON can hold."""
    content = dataclasses.asdict(plan)
    for phase, shown in zip(plan.phases, content["phases"], strict=True):
        shown["bytes"] = phase.bytes
    if "files" in content:
        content["files"] = dict(content["files"])
        content["bundle_bytes"] = sum(content["files"].values())
    if content.get("calibration"):
        content["calibration"]["tokens"] = plan.calibration.tokens  # type: ignore[union-attr]
    peak = {"phase": plan.peak.name, "bytes": plan.peak.bytes}
    return {"kind": "plan", **content, "peak": peak, "disk_bytes": plan.disk_bytes}


def lines(plan: "Plan", free: int | None) -> list[str]:
    """A plan as a person reads it; `free` is the room on the disk in bytes, None where it is not known."""
    content = facts(plan)
    simple = {
        name: value for name, value in content.items() if isinstance(value, int | str) and not name.endswith("bytes")
    }
    shown = [f"{name.replace('_', ' ')}  {_number(value)}" for name, value in simple.items() if name != "kind"]
    if content.get("calibration"):
        text = content["calibration"]
        shown.append(
            f"calibration  at most {text['tokens']:,} tokens, {text['sequences']} sequences of {text['length']}"
        )
    for name in ("base", "bundle"):
        if name in content:
            shown += ["", *_parts(name, getattr(plan, name))]
    if "files" in content:
        shown += ["", *_table(["files of the bundle", "size"], [[n, size(s)] for n, s in content["files"].items()])]
    for phase in plan.phases:
        shown += ["", *_phase(phase)]
    shown += ["", *_terms("disk", plan.disk, plan.disk_bytes)]
    if free is not None:
        shown.append(f"free on that disk: {size(free)}")
    shown += ["", f"peak memory: {size(plan.peak.bytes)} while {plan.peak.name}; nothing was done yet"]
    return shown


def size(count: int) -> str:
    """Bytes as a person reads them."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def _number(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value


def _parts(title: str, parts: "Iterable[Part]") -> list[str]:
    held = [one for one in parts if one.parameters]
    rows = [[one.name, str(one.blocks or ""), f"{one.parameters:,}", size(one.bytes)] for one in held]
    total = ["together", "", f"{sum(one.parameters for one in held):,}", size(sum(one.bytes for one in held))]
    return _table([title, "blocks", "parameters", "weights"], [*rows, total])


def _phase(phase: "Phase") -> list[str]:
    return _terms(f"memory while {phase.name}", phase.terms, phase.bytes)


def _terms(title: str, terms: "Sequence[Term]", total: int) -> list[str]:
    rows = [[term.name, size(term.bytes), term.formula] for term in terms if term.bytes]
    return _table([title, "size", "formula"], [*rows, ["together", size(total), ""]])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their longest cell; numbers and sizes at the right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        fitted = [
            cell.ljust(width) if i == 0 or head[i] == "formula" else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(fitted).rstrip()

    return [line(head), *(line(row) for row in rows)]


def _free(out: Path) -> int | None:
    there = next((folder for folder in (out, *out.resolve().parents) if folder.is_dir()), None)
    try:
        return shutil.disk_usage(there).free if there else None
    except OSError:
        return None
