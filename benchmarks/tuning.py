"""Compares `offsite tune` with full fine-tuning and LoRA on the full model, in speed and memory.

    python -m benchmarks.tuning --data-root ../shared/data        every cell of benchmarks/cells.py but the last
    python -m benchmarks.tuning --cells smollm2/sciq --quick      one cell, few steps, peers with their usual settings
    python -m benchmarks.tuning --predict                         only ratios from counted operations; measures nothing

The peers are transformers' Trainer in two configurations. In the fastest one it has bf16, rows padded to the longest of
a batch, fused AdamW, and the batch size, allocator, threads, dtype and attention that a short calibration finds
fastest. "As the paper's code" it has fp32 weights under autocast, and batches of four rows, all padded to the longest
row of the data set. If bf16 is not faster on this CPU, no contestant uses it. Every contestant gets the same rows in
the same steps, which is checked. Every repetition is a process of its own, and contestants take turns. Speeds are those
of the steps after the warm-up, and peaks of memory are as the system reports them. An interrupted run continues from
the work folder.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.bounds import operations, shape_of
from benchmarks.cells import BEST, CELLS, CONTESTANTS, DEFAULT, FIRST, PADDED, PEERS, Cell
from benchmarks.compared import (
    HABITS,
    against,
    fastest_habits,
    percent,
    products,
    said_products,
    share_of_peak,
    slowest_and_fastest,
    usual_habits,
    write_beside,
)
from benchmarks.work import OFFSITE, ROOT, ChildError, Work, code_digest, digest, last_line, run

from benchmarks import work as bench

RESULT = Path(__file__).parent / "results" / "tuning.json"
PREDICTED = Path(__file__).parent / "results" / "predicted.json"
_PAPER_BATCH = 4  # of its scripts for OPT-1.3B
_COLUMNS = (
    "", "tokens/s (least to most)", "examples/s", "peak, GiB", "share of matrix-product peak",
    "speed against full / LoRA", "counted bound", "memory below full / LoRA",
)  # fmt: skip


def main() -> None:
    """Measure what the work folder does not have yet, write the result file and print it as tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=lambda path: Path(path).resolve(), default=ROOT.parent / "shared" / "data")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(DEFAULT), metavar="SHAPE/DATA")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument(
        "--quick", action="store_true", help="few steps; peers try rows at once alone, not their other habits"
    )
    parser.add_argument("--predict", action="store_true", help="print counted bounds and measure nothing")
    parser.add_argument("--repetitions", type=int, default=3, help="two more of cells without peers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--fp32", action="store_true", help="everybody in fp32, as where bf16 is no faster")
    parser.add_argument("--work", type=Path, default=Path("offsite-bench"), help="bases, bundles and measurements")
    parser.add_argument("--result", type=Path, default=RESULT)
    wanted = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(wanted.threads), "HF_HUB_OFFLINE": "1"}
    cells = [CELLS[name].shortened() if wanted.quick else CELLS[name] for name in wanted.cells]
    work, root = Work(wanted.work, wanted.threads, fp32=wanted.fp32), wanted.data_root
    for cell in {FIRST.data: FIRST, **{cell.data: cell for cell in cells}}.values():
        work.source(root, cell.data)  # before any work
    if wanted.predict:
        _predict(work, cells, root)
        return
    records = []
    for cell in cells:
        here = [name for name in cell.contestants if name in wanted.contestants]
        try:
            records += Measurements(work, cell, root, quick=wanted.quick).records(here, cell.times(wanted.repetitions))
        except ChildError as error:
            sys.exit(f"{error}\nwhat was measured stays in {work.folder}: run the same command again to continue")
        write_beside(wanted.result, work, records, ("shape", "data"), [cell.name for cell in CELLS.values()])
    print(table(json.loads(wanted.result.read_text())))


class Measurements:
    """Measures the contestants of one cell: one shape of a model on one data set."""

    _usual: Mapping[str, Any] = HABITS  # of peers

    def __init__(self, work: Work, cell: Cell, root: Path, *, quick: bool) -> None:
        self._work, self._cell, self._root, self._quick = work, cell, root, quick
        self._base, self._rows = work.base(cell.shape), work.rows(cell, root)
        if work.fp32:
            self._usual = usual_habits(bf16=False)
        self.plan = self._planned()

    def records(self, contestants: Sequence[str], repetitions: int) -> list[dict[str, Any]]:
        """Measure the contestants in turns, and compare them.

        Returns:
            A record for the result file of each contestant, with its figures and its ratios to the peers.
        """
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
        for repetition in range(repetitions):
            first = repetition % max(1, len(contestants))
            for name in (*contestants[first:], *contestants[:first]):
                runs[name].append(self._measured(name, repetition))
        shape = shape_of(self._cell, self._base, self.plan)
        counted = {name: operations(shape, name, self._pad_to(name)) for name in contestants}
        return [self._record(name, runs, counted) for name in contestants]

    def _record(
        self, name: str, runs: Mapping[str, list[dict[str, Any]]], counted: Mapping[str, float]
    ) -> dict[str, Any]:
        """The record of one contestant for the result file: medians over its runs, and ratios to the peers."""
        each = self.plan["tokens"] / self.plan["rows"]
        of_a_step = each * self._cell.rows
        speeds = {one: [of_a_step / statistics.fmean(run["seconds"]) for run in runs[one]] for one in runs}
        speed = {one: statistics.median(found) for one, found in speeds.items()}
        memory = {one: int(statistics.median(run["peak_bytes"] for run in runs[one])) for one in runs}
        peaks = products(runs)
        record = {
            "shape": self._cell.shape, "data": self._cell.data, "contestant": name,
            "method": name.split(",")[0].removeprefix("offsite "),
            "examples_per_s": round(speed[name] / each, 3),
            "tokens_per_s": round(speed[name], 1),
            "spread": [round(min(speeds[name]), 1), round(max(speeds[name]), 1)],
            "peak_bytes": memory[name],
            "share_of_peak": share_of_peak(runs[name], speeds[name], counted[name], peaks),
        }  # fmt: skip
        for rival in (*BEST, *PADDED):
            if rival in runs:
                label = rival.split(",")[0] + ("_padded" if rival in PADDED else "")
                record |= against(name, rival, label, speed, memory, counted)
        return record | {
            "operations_per_token": round(counted[name]),
            "matmul_gflops": slowest_and_fastest(peaks),
            "rows_of_a_step": self._cell.rows,
            "tokens_of_a_row": round(each, 1),
            "padding": round(self.plan["padded"] / self.plan["tokens"], 3) if name not in PEERS else None,
            "settings": None if name not in PEERS else self._habits_of(name),
            "runs": [{key: run[key] for key in run if key not in ("key", "of", "fits")} for run in runs[name]],
            "measured_at": runs[name][-1]["at"][:10],
            "commit": bench.commit(),
        }

    def _planned(self) -> dict[str, Any]:
        """The plan of the cell's steps, as `benchmarks.steps` prints it: the seed, and numbers of rows and tokens."""
        source = self._work.source(self._root, self._cell.data)
        wanted = {
            "base": str(self._base), "rows": str(self._rows), "whole": str(source), "per_step": self._cell.rows,
            "warmup": self._cell.warmup, "steps": self._cell.steps,
        }  # fmt: skip

        def make() -> dict[str, Any]:
            return dict(last_line(run([sys.executable, "-m", "benchmarks.steps", json.dumps(wanted)])[0]))

        of = [asdict(self._cell), digest(self._rows.read_text()), code_digest(), _text("steps.py")]
        return self._work.once(f"{self._cell.name}/plan", of, make)

    def _measured(self, name: str, repetition: int) -> dict[str, Any]:
        """Run a contestant, such as "lora" or "offsite lora", or read the saved result of this repetition."""
        key = f"{self._cell.name}/{name}/{repetition}"
        if name in PEERS:
            pad_to = self._pad_to(name)
            steps = 1 if pad_to else self._cell.steps  # every padded step costs the same, whatever its rows
            return self._peer(key, name.split(",")[0], self._habits_of(name), steps, pad_to)
        method = name.split()[1]
        of = [asdict(self._cell), self.plan["seed"], self.plan["tokens"], code_digest()]
        return self._work.once(key, of, lambda: self._work.beside_products(lambda: self._ours(method)))

    def _ours(self, method: str) -> dict[str, Any]:
        """Run `offsite tune` on a bundle; returns the seconds of each measured step, the peak memory and the losses."""
        cell, work = self._cell, self._work
        bundle, out = work.bundle(cell.shape), work.folder / "return"
        log, settings = out.with_name("return.log.jsonl"), work.folder / "settings.toml"
        for left in (out, out.with_name("return.run")):
            shutil.rmtree(left, ignore_errors=True)
        log.unlink(missing_ok=True)
        settings.write_text(
            f'[tune]\nlong_rows = "truncate"\nsave_every = 1000000\nseed = {self.plan["seed"]}\n'
            f'threads = {work.threads}\ncompute = "{"fp32" if work.fp32 else "auto"}"\n'
        )
        words = ["tune", bundle, "--data", self._rows, "--out", out, "--method", method, "--config", settings]
        words += ["--max-steps", cell.warmup + cell.steps, "--batch-size", cell.rows, "--home", work.home]
        _, peak = run([*OFFSITE, *map(str, words)])
        marks = [record for record in map(json.loads, log.read_text().splitlines()) if record["event"] == "step"]
        timed = marks[cell.warmup - 1 :]
        seconds = [round(after["time"] - before["time"], 4) for before, after in itertools.pairwise(timed)]
        self._require_same_rows(sum(mark["tokens"] for mark in timed[1:]))
        return {"seconds": seconds, "peak_bytes": peak, "losses": [round(mark["loss"], 4) for mark in marks]}

    def _peer(
        self,
        key: str,
        method: str,
        settings: Mapping[str, Any],
        steps: int,
        pad_to: int | None = None,
        *,
        may_fail: bool = False,
    ) -> dict[str, Any]:
        """Run a peer, or read the saved result of that run.

        Args:
            key: the name of the run in the work folder.
            method: "full" or "lora".
            settings: the peer's settings, with its batch size.
            steps: the number of measured steps.
            pad_to: the width in tokens to which all rows are padded; None: to the longest row of a batch.
            may_fail: whether a run that does not fit into memory returns {"fits": False}, and no error is raised.
        """
        cell = self._cell
        wanted = {
            "base": str(self._base), "rows": str(self._rows), "method": method, "batch": settings["batch"],
            "per_step": cell.rows, "warmup": cell.warmup, "steps": steps, "seed": self.plan["seed"], "pad_to": pad_to,
            "threads": self._work.threads, "keep_freed": settings["keep_freed"], "bf16": settings["bf16"],
            "attention": settings["attention"], "out": str(self._work.folder / "trainer"),
        }  # fmt: skip

        def measure() -> dict[str, Any]:
            command = [sys.executable, "-m", "benchmarks.peers", json.dumps(wanted)]
            try:
                output, peak = run(command, {"OMP_WAIT_POLICY": settings["wait"]})
            except ChildError as error:
                if may_fail and error.no_memory:
                    return {"fits": False}
                raise
            found: dict[str, Any] = last_line(output)
            if steps == cell.steps:
                self._require_same_rows(found["tokens"])
            return {**found, "peak_bytes": peak, "fits": True}

        of = [wanted, settings["wait"], self.plan["tokens"], _text("peers.py"), _text("steps.py")]
        return self._work.once(key, of, measure)

    def _require_same_rows(self, tokens: int) -> None:
        """Exit if the measured steps of a run had another number of tokens than the plan says."""
        if tokens != self.plan["tokens"]:
            sys.exit(f"{self._cell.name}: {tokens} tokens in the steps on the clock, not {self.plan['tokens']}")

    def _pad_to(self, name: str) -> int | None:
        """The width in tokens to which a contestant that runs as the paper's code pads all rows; None for all others.

        It is the next multiple of 8 above the longest row's length, at most 1,024.
        """
        return min(1024, (self.plan["longest"] // 8 + 1) * 8) if name in PADDED else None

    def _habits_of(self, name: str) -> dict[str, Any]:
        """The settings and batch size of a peer: those of the paper's code, or the fastest in its calibration."""
        if name in PADDED:
            batch = min(_PAPER_BATCH, self._cell.rows)
            return {**self._usual, "keep_freed": False, "attention": "eager", "batch": batch}
        usual = self._usual
        habits = usual if self._quick else self._settled(name)
        ways = [habits, *([usual] if habits != usual and self._cell != FIRST else [])]  # long rows differ from short
        most = max(self._cell.batches)
        habits = self._fastest(name, [{**way, "batch": most} for way in ways])
        return self._fastest(name, [{**habits, "batch": batch} for batch in self._cell.batches])

    def _fastest(self, name: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The fastest of several settings of a peer, by a short run of each; a single one is returned without a run."""
        return choices[0] if len(choices) == 1 else max(choices, key=lambda settings: self._tried(name, settings))

    def _tried(self, name: str, settings: Mapping[str, Any]) -> float:
        """Tokens per second of a peer with these settings, in a run of one measured step in this cell."""
        usual = ", usual habits" if settings.items() >= self._usual.items() else ""
        key = f"{self._cell.name}/{name}/calibration/{settings['batch']} at once{usual}"
        return self._speed(key, name, settings, 1)

    def _settled(self, method: str) -> dict[str, Any]:
        """The fastest settings of a peer, apart from the batch size, as found by a calibration in the first cell.

        Allocator, threads, dtype and attention are changed one at a time; what is clearly faster is kept.
        """
        if self._cell != FIRST:
            return Measurements(self._work, FIRST, self._root, quick=False)._settled(method)

        def speed(key: str, habits: Mapping[str, Any]) -> float:
            settings = {**habits, "batch": max(FIRST.batches)}
            return self._speed(f"{FIRST.name}/{method}/calibration/{key}", method, settings, FIRST.steps)

        return fastest_habits(speed, self._usual)

    def _speed(self, key: str, method: str, settings: Mapping[str, Any], steps: int) -> float:
        """Tokens per second of a peer's calibration run; 0 if it does not fit into this machine's memory."""
        found = self._peer(key, method, settings, steps, may_fail=True)
        return float(found["tokens"] / sum(found["seconds"])) if found["fits"] else 0.0


def _text(name: str) -> str:
    """The digest of the text of a file in this folder."""
    return digest((Path(__file__).parent / name).read_text())


def _predict(work: Work, cells: Sequence[Cell], root: Path) -> None:
    """Write and print the ratios of speed that counted operations predict for each cell; nothing is measured."""
    found = []
    for cell in cells:
        one = Measurements(work, cell, root, quick=True)
        shape = shape_of(cell, work.base(cell.shape), one.plan)
        counted = {name: operations(shape, name, one._pad_to(name)) for name in CONTESTANTS}
        found += [
            {
                "shape": cell.shape, "data": cell.data, "contestant": name,
                "operations_per_token": round(counted[name]),
                **{f"counted_bound_vs_{rival}": round(counted[rival] / counted[name], 2) for rival in BEST},
            }
            for name in CONTESTANTS
            if name not in PEERS and name in cell.contestants
        ]  # fmt: skip
    PREDICTED.write_text(json.dumps({"records": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def table(results: Mapping[str, Any]) -> str:
    """Format the results as Markdown, with a table for each cell."""
    lines = []
    for shape, data in dict.fromkeys((record["shape"], record["data"]) for record in results["records"]):
        records = [record for record in results["records"] if (record["shape"], record["data"]) == (shape, data)]
        one = records[0]
        about = (
            f"**{shape}, {data}**: {one['rows_of_a_step']} rows a step of {one['tokens_of_a_row']:.0f} tokens each; "
            + said_products(one)
        )
        lines += [
            about, "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|",
        ]  # fmt: skip
        for record in records:
            low, high = record["spread"]
            pair = [" / ".join(f"{record.get(f'{what}_vs_{rival}', '-')}" for rival in BEST)
                    for what in ("speed", "counted_bound", "memory")]  # fmt: skip
            lines.append(
                f"| {record['contestant']} | {record['tokens_per_s']:.0f} ({low:.0f} to {high:.0f}) "
                f"| {record['examples_per_s']:.2f} | {record['peak_bytes'] / 2**30:.2f} "
                f"| {percent(record['share_of_peak'])} | {pair[0]} | {pair[1]} | {pair[2]} |"
            )
        padding = {record["padding"] for record in records if record["padding"]}
        lines += ["", *(f"Padded over real tokens in offsite's steps: {found}." for found in padding), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
