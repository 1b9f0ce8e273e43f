"""Compares two versions of this repository in speed and memory of `offsite tune`.

    git worktree add ../before v0.1.0
    python -m benchmarks.versions ../before --data-root ../shared/data

Each version runs its own `benchmarks.tuning --quick` without peers, with its own code, bases and bundles. The versions
take turns run by run, so that both are slowed down if the machine gets slower for some minutes. Compiled kernels are
used if they are built: build them in both trees, or in neither. Prints medians, and ratios of this version to the other
one: above 1, this version is slower or needs more memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.work import ROOT, versions

RESULT = Path(__file__).parent / "results" / "versions.json"
CELLS = ("smollm2/sciq", "smollm2/gsm8k", "gpt2-large/sciq", "opt-1.3b, 18 blocks/sciq")
CONTESTANTS = ("offsite lora", "offsite full")
_HEAD = (
    "", "contestant", "seconds, before", "after", "ratio", "ratio in products", "peak in MiB, before", "after", "ratio",
)  # fmt: skip


def main() -> None:
    """Measure both versions, write the result and print it as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the other version")
    parser.add_argument("--data-root", type=lambda path: Path(path).resolve(), default=ROOT.parent / "shared" / "data")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), metavar="SHAPE/DATA")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--work", type=lambda path: Path(path).resolve(), default=Path("offsite-bench-versions"))
    parser.add_argument("--result", type=Path, default=RESULT)
    wanted = parser.parse_args()
    trees = {"before": wanted.before.resolve(), "after": ROOT}
    results: dict[str, dict[str, Any]] = {}
    for repetition in range(1, wanted.repetitions + 1):
        for cell in wanted.cells:
            order = list(trees) if repetition % 2 else list(reversed(trees))
            for name in order:
                results[f"{name}/{cell}"] = _run(trees[name], wanted, name, cell, repetition)
    records = [_compare(results, cell, contestant) for cell in wanted.cells for contestant in CONTESTANTS]
    machine = results[f"after/{wanted.cells[0]}"]["machine"]
    commits = {name: _commit(tree) for name, tree in trees.items()}
    result = {"machine": machine, "versions": versions(), "commits": commits, "records": records}
    wanted.result.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def _run(tree: Path, wanted: argparse.Namespace, name: str, cell: str, repetitions: int) -> dict[str, Any]:
    """Run one version's own benchmark of a cell; the runs of earlier repetitions are read from its work folder.

    Args:
        tree: the checkout of the version.
        wanted: the arguments of the command line.
        name: "before" or "after".
        cell: the name of the cell.
        repetitions: the number of runs of each contestant, including earlier ones.

    Returns:
        The content of the version's result file.
    """
    work = wanted.work / name
    result = work / f"{cell.replace('/', ' ')}.json"
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.tuning", "--quick", "--cells", cell, "--contestants", *CONTESTANTS]
    command += ["--data-root", str(wanted.data_root), "--repetitions", str(repetitions)]
    command += ["--work", str(work), "--result", str(result)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tree / "src"), str(tree)))}
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name}, {cell}: the benchmark ended with {done.returncode}; run the same command again to continue")
    print(f"{name}, {cell}, repetition {repetitions}: done", file=sys.stderr, flush=True)
    return dict(json.loads(result.read_text()))


def _compare(results: Mapping[str, Mapping[str, Any]], cell: str, contestant: str) -> dict[str, Any]:
    """Compare both versions of a contestant in a cell: medians of seconds and peak memory, and their ratios."""
    found = {name: _runs(results[f"{name}/{cell}"], cell, contestant) for name in ("before", "after")}
    seconds = {name: statistics.median(sum(run["seconds"]) for run in runs) for name, runs in found.items()}
    products = {name: statistics.median(_in_products(run) for run in runs) for name, runs in found.items()}
    peaks = {name: statistics.median(run["peak_bytes"] for run in runs) for name, runs in found.items()}
    return {
        "cell": cell, "contestant": contestant, "runs": {name: len(runs) for name, runs in found.items()},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "ratio": round(seconds["after"] / seconds["before"], 3),
        "ratio_in_products": round(products["after"] / products["before"], 3),
        "peak_bytes": {name: int(value) for name, value in peaks.items()},
        "peak_ratio": round(peaks["after"] / peaks["before"], 3),
    }  # fmt: skip


def _runs(result: Mapping[str, Any], cell: str, contestant: str) -> Sequence[Mapping[str, Any]]:
    """The runs of a contestant in a cell, from a version's result."""
    found = (r for r in result["records"] if f"{r['shape']}/{r['data']}" == cell and r["contestant"] == contestant)
    runs: Sequence[Mapping[str, Any]] = next(found)["runs"]
    return runs


def _in_products(run: Mapping[str, Any]) -> float:
    """A run's time in units of the machine's own matrix products, measured just before and after it.

    If the machine is slower for a while, both are, so the ratio of two runs does not change.
    """
    return float(sum(run["seconds"]) * statistics.fmean(run["matmul_flops"]))


def _commit(tree: Path) -> str:
    """The short hash of the commit that a folder has checked out."""
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=tree, text=True).strip()


def table(result: Mapping[str, Any]) -> str:
    """Format the result as a Markdown table, one row for each cell and contestant."""
    lines = [f"| {' | '.join(_HEAD)} |", "|---|---|" + "---:|" * 7]
    for record in result["records"]:
        seconds, peaks = record["seconds"], {name: size / 2**20 for name, size in record["peak_bytes"].items()}
        lines.append(
            f"| {record['cell'].replace('/', ', ')} | {record['contestant']} | {seconds['before']} | "
            f"{seconds['after']} | {record['ratio']} | {record['ratio_in_products']} | {peaks['before']:,.0f} | "
            f"{peaks['after']:,.0f} | {record['peak_ratio']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
