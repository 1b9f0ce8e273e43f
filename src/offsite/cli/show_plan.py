"""Prints the plan of a stage (the result of --plan), as tables or as JSON."""

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from offsite.cli import terminal
from offsite.cli.text_table import text_table
from offsite.errors import one_line

if TYPE_CHECKING:
    from offsite.data_owner.plan import TunePlan
    from offsite.model_owner.plan import PackPlan
    from offsite.model_owner.plugging_in.plan_plug_in import PlugInPlan
    from offsite.models.plan_amounts import Amount, Measurement, Part

    Plan = PackPlan | PlugInPlan | TunePlan

_SINGLE = (int, float, str)  # types of the fields that are printed as a line each


def show_plan(plan: "Plan", out: Path, *, as_json: bool) -> None:
    """Print a plan on standard output.

    Args:
        plan: the plan of any stage.
        out: the folder that the stage would make; it is used only to find the free space on its disk.
        as_json: print JSON, with every size in bytes and every time in seconds.
    """
    free = _free(out)
    if as_json:
        terminal.show({**facts(plan), "disk_free_bytes": free}, as_json=True)
        return
    for line in lines(plan, free):
        typer.echo(one_line(line))


def facts(plan: "Plan") -> dict[str, Any]:
    """A plan as values that JSON can hold."""
    content = {"kind": "plan", **dataclasses.asdict(plan), "disk_bytes": plan.disk_bytes}
    for name in ("files", "disk"):
        content[name] = {amount.name: amount.bytes for amount in getattr(plan, name)}
    content["memory"] = [
        {"compute": memory.compute, "bytes": memory.bytes, "weights": {one.name: one.bytes for one in memory.amounts}}
        for memory in getattr(plan, "memory", ())
    ]
    measured = getattr(plan, "measured", None)
    content["measured"] = {**dataclasses.asdict(measured), "run_seconds": measured.run_seconds} if measured else None
    return content


def lines(plan: "Plan", free: int | None) -> list[str]:
    """Format a plan as lines of text; `free` is the free disk space in bytes, or None if unknown."""
    single = {one.name: getattr(plan, one.name) for one in dataclasses.fields(plan)}
    shown = [
        f"{name.replace('_', ' ')}  {_number(value)}" for name, value in single.items() if isinstance(value, _SINGLE)
    ]
    if work := getattr(plan, "work", None):
        shown.append(f"the base's network runs to {', '.join(work)}")
    for name in ("base", "bundle"):
        if hasattr(plan, name):
            shown += ["", *_parts(name, getattr(plan, name))]
    shown += ["", *_amounts("file", plan.files)]
    for memory in getattr(plan, "memory", ()):
        shown += ["", *_amounts(f"in memory, computing in {memory.compute}", memory.amounts)]
    shown += ["", *_amounts("disk", plan.disk)]
    if free is not None:
        shown.append(f"free on that disk: {size(free)}")
    measured = getattr(plan, "measured", None)
    return [*shown, "", *(_measurement(measured) if measured else _unmeasured(plan)), "nothing was written"]


def size(count: int) -> str:
    """Format a number of bytes in GiB, MiB or KiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def _measurement(measured: "Measurement") -> list[str]:
    """Lines of text for the measured memory and time of a plan."""
    held = "torch on the device" if measured.device.startswith("cuda") else "the process"
    whole = _duration(measured.run_seconds)
    return [
        f"measured on this machine ({measured.device}, {measured.compute}): {measured.what}",
        f"peak memory of {held}: {size(measured.peak_bytes)}",
        f"seconds: {measured.seconds:.2f}, so about {whole} for the run, without loading, validating and writing",
    ]


def _unmeasured(plan: "Plan") -> list[str]:
    """A line of text for a plan without a measurement: what its figures of memory do not include."""
    if not getattr(plan, "memory", ()):
        return ["no network runs: tensors are copied in pieces, whatever the model's size"]
    return ["activations and libraries come on top of these weights: `--plan measure` runs a small part and measures"]


def _duration(seconds: float) -> str:
    """Seconds as text, such as 1:02:03 (hours, minutes, seconds)."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _number(value: float | str) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _parts(title: str, parts: "Iterable[Part]") -> list[str]:
    """Format the parts of a model, with numbers of blocks and parameters, as a table of text."""
    held = [one for one in parts if one.parameters]
    rows = [[one.name, str(one.blocks or ""), f"{one.parameters:,}", size(one.bytes)] for one in held]
    total = ["together", "", f"{sum(one.parameters for one in held):,}", size(sum(one.bytes for one in held))]
    return text_table([title, "blocks", "parameters", "weights"], [*rows, total])


def _amounts(title: str, amounts: "Sequence[Amount]") -> list[str]:
    """Format named sizes in bytes, and their sum, as a table of text."""
    rows = [[one.name, size(one.bytes)] for one in amounts]
    together = [["together", size(sum(one.bytes for one in amounts))]] if len(amounts) > 1 else []
    return text_table([title, "size"], [*rows, *together])


def _free(out: Path) -> int | None:
    """The free space in bytes on the disk that will have the folder `out`; None if unknown."""
    there = next((folder for folder in (out, *out.resolve().parents) if folder.is_dir()), None)
    try:
        return shutil.disk_usage(there).free if there else None
    except OSError:
        return None
