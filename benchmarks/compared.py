"""Compares contestants: finds the fastest settings of peers, computes ratios, and merges results into a file.

Peers run transformers' Trainer on the whole model; the other contestants run `offsite tune` on a bundle.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.work import Work, machine, versions

from offsite.kernels.cpu.cpu_features import multiplies_bf16


def usual_habits(*, bf16: bool) -> dict[str, Any]:
    """The settings that a peer (transformers' Trainer) uses unless a calibration finds others faster.

    Args:
        bf16: whether the CPU multiplies bf16 faster than fp32; if not, bf16 is never tried.

    Returns:
        "keep_freed" (whether the allocator keeps freed memory), "wait" (OMP_WAIT_POLICY), "bf16" (whether to compute in
        it) and "attention" (transformers' name).
    """
    return {"keep_freed": True, "wait": "ACTIVE", "bf16": bf16, "attention": "sdpa"}


HABITS: Mapping[str, Any] = usual_habits(bf16=multiplies_bf16())
_OTHERS: Mapping[str, Any] = {"keep_freed": False, "wait": "PASSIVE", "bf16": False, "attention": "eager"}
_CLEARLY = 1.05  # times as fast; less is within what the same run differs by on a busy machine


def fastest_habits(
    speed: Callable[[str, Mapping[str, Any]], float], usual: Mapping[str, Any] = HABITS
) -> dict[str, Any]:
    """Find the fastest settings of a peer: each is changed once, and stays changed if that is at least 5 % faster.

    Args:
        speed: takes a key and settings; does a short run, saves it under the key, and returns its speed.
        usual: the settings to start from, as `usual_habits` returns them.
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
    """Compute a contestant's ratios of speed and memory to a rival, and the speed ratio that operation counts predict.

    Args:
        name: the contestant.
        rival: the contestant that it is compared with.
        label: the rival's name in the keys of the result.
        speed: tokens or images per second, by contestant.
        memory: peak memory in bytes, by contestant.
        counted: operations per token or image, by contestant.

    Returns:
        For a label L: "speed_vs_L", "memory_vs_L" and "counted_bound_vs_L", which are above 1 if the contestant is
        faster or needs less than the rival; and "share_of_bound_vs_L", the measured ratio of speed divided by the
        counted one.
    """
    ratio, bound = speed[name] / speed[rival], counted[rival] / counted[name]
    return {
        f"speed_vs_{label}": round(ratio, 2),
        f"memory_vs_{label}": round(memory[rival] / memory[name], 2),
        f"counted_bound_vs_{label}": round(bound, 2),
        f"share_of_bound_vs_{label}": round(ratio / bound, 2),
    }


def products(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[float]:
    """List all measured speeds of the machine's own matrix products, in operations per second.

    Args:
        runs: the runs of each contestant; only those of `offsite tune` have such a measurement.
    """
    return [each for found in runs.values() for run in found for each in run.get("matmul_flops", ())]


def share_of_peak(
    runs: Sequence[Mapping[str, Any]], speeds: Sequence[float], operations: float, usual: Sequence[float]
) -> float | None:
    """A contestant's operations per second as a share of those of plain matrix products; the median over its runs.

    Args:
        runs: the contestant's runs.
        speeds: the speed of each run, in tokens or images per second.
        operations: counted operations per token or image.
        usual: speeds of matrix products in the whole cell, in operations per second; their median is used for runs
            without such a measurement. If it is empty, the result is None.
    """
    if not usual:
        return None
    at_the_time = [run.get("matmul_flops") or [statistics.median(usual)] for run in runs]
    shares = [speed * operations / statistics.fmean(found) for speed, found in zip(speeds, at_the_time, strict=True)]
    return round(statistics.median(shares), 3)


def slowest_and_fastest(peaks: Sequence[float]) -> list[int] | None:
    """The lowest and the highest of some speeds in operations per second, as GFLOP/s; None if there are none."""
    return [round(edge / 1e9) for edge in (min(peaks), max(peaks))] if peaks else None


def said_products(record: Mapping[str, Any]) -> str:
    """The measured speed of the machine's matrix products in a record, in GFLOP/s, as text."""
    if record.get("matmul_gflops", ...) is None:
        return "matrix products were not measured"
    low, high = record.get("matmul_gflops") or [record["matmul_peak_gflops"]] * 2  # which earlier results have
    return f"matrix products reach {high}" + (f", and {low} at the least," if low < high else "") + " GFLOP/s"


def percent(share: float | None) -> str:
    """A share as text in per cent; None becomes "-"."""
    return "-" if share is None else f"{100 * share:.0f} %"


def write_beside(
    file: Path, work: Work, records: Sequence[Mapping[str, Any]], cell: Sequence[str], order: Sequence[str]
) -> None:
    """Write records to a result file; its records of other cells are kept if machine and library versions are the same.

    Args:
        file: the result file.
        work: the work folder, which has the number of threads of the measurements.
        records: all records of the measured cells; they replace earlier ones of these cells.
        cell: the keys of a record whose values, joined by a slash, are the name of its cell.
        order: the names of all cells, in the order of the file.
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
