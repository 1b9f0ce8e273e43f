"""Contestants held against each other: how peers run at their best, ratios, and results kept beside earlier ones."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.work import Work, machine, versions

from offsite.kernels.cpu.cpu_features import multiplies_bf16


def usual_habits(*, bf16: bool) -> dict[str, Any]:
    """How a peer runs unless a calibration finds the other way faster.

    Args:
        bf16: whether the processor multiplies it faster than fp32. Where not, it is not even tried.
    """
    return {"keep_freed": True, "wait": "ACTIVE", "bf16": bf16, "attention": "sdpa"}


HABITS: Mapping[str, Any] = usual_habits(bf16=multiplies_bf16())
_OTHERS: Mapping[str, Any] = {"keep_freed": False, "wait": "PASSIVE", "bf16": False, "attention": "eager"}
_CLEARLY = 1.05  # times as fast; less is within what the same run differs by on a busy machine


def fastest_habits(
    speed: Callable[[str, Mapping[str, Any]], float], usual: Mapping[str, Any] = HABITS
) -> dict[str, Any]:
    """Memory, threads, dtype, attention: each is changed once, and stays so if that is clearly faster.

    Args:
        speed: of a short run with these habits, under a key of its own.
        usual: what is changed.
    """
    habits = dict(usual)
    best = speed("habits", habits)
    for habit, other in _OTHERS.items():
        if habits[habit] == other:
            continue
        changed = {**habits, habit: other}
        found = speed(f"{habit} {other}", changed)
        if found > _CLEARLY * best:
            habits, best = changed, found
    return habits


def against(
    name: str,
    rival: str,
    label: str,
    speed: Mapping[str, float],
    memory: Mapping[str, int],
    counted: Mapping[str, float],
) -> dict[str, float]:
    """How many times faster and smaller a contestant is than a rival, and than arithmetic alone would make it.

    Args:
        name: the contestant.
        rival: whom it is held against.
        label: the rival in the names of the ratios.
        speed: of each, in tokens or images a second.
        memory: peak bytes of each.
        counted: operations of each for one token or image.
    """
    ratio, bound = speed[name] / speed[rival], counted[rival] / counted[name]
    return {
        f"speed_vs_{label}": round(ratio, 2),
        f"memory_vs_{label}": round(memory[rival] / memory[name], 2),
        f"counted_bound_vs_{label}": round(bound, 2),
        f"share_of_bound_vs_{label}": round(ratio / bound, 2),
    }


def products(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[float]:
    """Operations a second of the machine's own matrix products, wherever a run was measured beside them."""
    return [each for found in runs.values() for run in found for each in run.get("matmul_flops", ())]


def share_of_peak(
    runs: Sequence[Mapping[str, Any]], speeds: Sequence[float], operations: float, usual: Sequence[float]
) -> float | None:
    """Counted operations a second over those of matrix products at the time, the median of a contestant's runs.

    Args:
        runs: its measurements.
        speeds: of each, in tokens or images a second.
        operations: counted for one token or image.
        usual: products' speeds of the whole cell, for runs that were not measured beside any.
    """
    if not usual:
        return None
    at_the_time = [run.get("matmul_flops") or [statistics.median(usual)] for run in runs]
    shares = [speed * operations / statistics.fmean(found) for speed, found in zip(speeds, at_the_time, strict=True)]
    return round(statistics.median(shares), 3)


def slowest_and_fastest(peaks: Sequence[float]) -> list[int] | None:
    """In GFLOP/s; None where none were measured."""
    return [round(edge / 1e9) for edge in (min(peaks), max(peaks))] if peaks else None


def said_products(record: Mapping[str, Any]) -> str:
    """What the machine's matrix products reached, in GFLOP/s, in words."""
    if record.get("matmul_gflops", ...) is None:
        return "matrix products were not measured"
    low, high = record.get("matmul_gflops") or [record["matmul_peak_gflops"]] * 2  # which earlier results have
    return f"matrix products reach {high}" + (f", and {low} at the least," if low < high else "") + " GFLOP/s"


def percent(share: float | None) -> str:
    """As tables show it."""
    return "-" if share is None else f"{100 * share:.0f} %"


def write_beside(
    file: Path, work: Work, records: Sequence[Mapping[str, Any]], cell: Sequence[str], order: Sequence[str]
) -> None:
    """Write the records, beside those of other cells that an earlier run measured on the same machine.

    Args:
        file: the result.
        work: whose threads were measured with.
        records: of whole cells.
        cell: the keys of a record that name its cell; joined by a slash they are the cell's name.
        order: the names of all cells.
    """
    found: dict[str, Any] = {
        "machine": machine(work.threads, fp32=work.fp32), "versions": versions(),
        "written_at": time.strftime("%Y-%m-%d"),
    }  # fmt: skip

    def name(record: Mapping[str, Any]) -> str:
        return "/".join(str(record[key]) for key in cell)

    before = json.loads(file.read_text()) if file.exists() else {}
    alike = all(before.get(key) == found[key] for key in ("machine", "versions"))
    measured = {name(record) for record in records}
    kept = [one for one in before.get("records", []) if alike and name(one) not in measured]
    found["records"] = sorted([*kept, *records], key=lambda one: order.index(name(one)))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
