"""Compares `offsite tune` on image encoders with full fine-tuning and LoRA of the whole encoder, in speed and memory.

    python -m benchmarks.images                               every cell of benchmarks/image_cells.py
    python -m benchmarks.images --cells vit-s-14 --quick      one cell; for the peers only the batch size is chosen

The rules are those of `benchmarks.tuning`. The peers are transformers' Trainer in its fastest configuration: bf16,
fused AdamW, and the batch size, allocator, threads, dtype and attention that a short calibration finds fastest. Every
contestant gets the same pictures, with the same crops, in the same steps. Every repetition is a process of its own, and
contestants take turns. Speeds are those of the steps after the warm-up, and peaks of memory are as the system reports
them. An interrupted run continues from the work folder.
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

from benchmarks.cells import RANK
from benchmarks.compared import (
    HABITS,
    against,
    fastest_habits,
    percent,
    products,
    said_products,
    share_of_peak,
    slowest_and_fastest,
    write_beside,
)
from benchmarks.counted import Shape, ours, peer
from benchmarks.image_cells import BEST, CELLS, FIRST, ImageCell, split_of
from benchmarks.work import OFFSITE, ChildError, Work, code_digest, commit, digest, last_line, run

RESULT = Path(__file__).parent / "results" / "images.json"
_COLUMNS = (
    "", "images/s (least to most)", "peak, GiB", "share of matrix-product peak", "speed against full / LoRA",
    "counted bound", "memory below full / LoRA",
)  # fmt: skip


def main() -> None:
    """Measure what the work folder does not have yet, write the result file and print it as tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="SHAPE")
    parser.add_argument("--contestants", nargs="+", help="these alone; else all of the cell")
    parser.add_argument("--quick", action="store_true", help="peers try pictures at once alone, not their other habits")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("offsite-bench"), help="bases, bundles and measurements")
    parser.add_argument("--result", type=Path, default=RESULT)
    wanted = parser.parse_args()
    cells = [CELLS[name] for name in wanted.cells]
    strange = set(wanted.contestants or ()) - {name for cell in cells for name in cell.contestants}
    if strange:
        parser.error(f"no cell has the contestants {sorted(strange)}: name some of {cells[0].contestants}")
    os.environ |= {"OMP_NUM_THREADS": str(wanted.threads), "HF_HUB_OFFLINE": "1"}
    work, records = Work(wanted.work, wanted.threads), []
    for cell in cells:
        here = [name for name in cell.contestants if name in (wanted.contestants or cell.contestants)]
        try:
            records += Measurements(work, cell, quick=wanted.quick).records(here, wanted.repetitions)
        except ChildError as error:
            sys.exit(f"{error}\nwhat was measured stays in {work.folder}: run the same command again to continue")
        write_beside(wanted.result, work, records, ("shape",), list(CELLS))
    print(table(json.loads(wanted.result.read_text())))


class Measurements:
    """Measures the contestants of one cell, that is, of one encoder."""

    def __init__(self, work: Work, cell: ImageCell, *, quick: bool) -> None:
        self._work, self._cell, self._quick = work, cell, quick
        self._base = self._made(work.folder / cell.shape, cell.shape)
        self._pictures = self._made(
            work.folder / f"pictures-{cell.pictures}-{cell.classes}",
            "pictures", "--count", str(cell.pictures), "--classes", str(cell.classes),
        )  # fmt: skip

    def _made(self, folder: Path, *words: str) -> Path:
        """Make a base or pictures with `benchmarks.random_encoder` in `folder`, unless it exists; returns `folder`."""
        if not folder.exists():
            what, *flags = words
            run([sys.executable, "-m", "benchmarks.random_encoder", what, str(folder), *flags])
        return folder

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
        counted = {name: operations(self._base, name) for name in contestants}
        return [self._record(name, runs, counted) for name in contestants]

    def _record(
        self, name: str, runs: Mapping[str, list[dict[str, Any]]], counted: Mapping[str, float]
    ) -> dict[str, Any]:
        """The record of one contestant for the result file: medians over its runs, and ratios to the peers."""
        speeds = {one: [self._cell.rows / statistics.fmean(run["seconds"]) for run in runs[one]] for one in runs}
        speed = {one: statistics.median(found) for one, found in speeds.items()}
        memory = {one: int(statistics.median(run["peak_bytes"] for run in runs[one])) for one in runs}
        peaks = products(runs)
        record = {
            "shape": self._cell.shape, "side": self._cell.side, "contestant": name,
            "method": name.split(",")[0].removeprefix("offsite "),
            "images_per_s": round(speed[name], 3),
            "spread": [round(min(speeds[name]), 3), round(max(speeds[name]), 3)],
            "peak_bytes": memory[name],
            "share_of_peak": share_of_peak(runs[name], speeds[name], counted[name], peaks),
        }  # fmt: skip
        for rival in BEST:
            if rival in runs:
                record |= against(name, rival, rival, speed, memory, counted)
        return record | {
            "operations_per_image": round(counted[name]),
            "matmul_gflops": slowest_and_fastest(peaks),
            "images_of_a_step": self._cell.rows,
            "settings": self._habits_of(name) if name in BEST else None,
            "runs": [{key: run[key] for key in run if key not in ("key", "of", "fits")} for run in runs[name]],
            "measured_at": runs[name][-1]["at"][:10],
            "commit": commit(),
        }

    def _measured(self, name: str, repetition: int) -> dict[str, Any]:
        """Run a contestant, such as "lora" or "offsite lora, 4-4-4", or read the saved result of this repetition."""
        key = f"images/{self._cell.shape}/{name}/{repetition}"
        if name in BEST:
            return self._peer(key, name, self._habits_of(name))
        of = [asdict(self._cell), code_digest()]
        return self._work.once(key, of, lambda: self._work.beside_products(lambda: self._ours(name)))

    def _ours(self, name: str) -> dict[str, Any]:
        """Run `offsite tune` on a bundle; returns the seconds of each measured step, the peak memory and the losses."""
        cell, work = self._cell, self._work
        method, split = name.split(", ")[0].split()[1], split_of(name)
        bundle = work.packed(f"{cell.shape}-{'-'.join(map(str, split))}", self._base, split)
        out, settings = work.folder / "return", work.folder / "settings.toml"
        log = out.with_name("return.log.jsonl")
        for left in (out, out.with_name("return.run")):
            shutil.rmtree(left, ignore_errors=True)
        log.unlink(missing_ok=True)
        # The head starts at random, as those of the peers do; a probe of noise would only take its time.
        settings.write_text(f'[tune]\nhead_start = "random"\nsave_every = 1000000\nthreads = {work.threads}\n')
        words = ["tune", bundle, "--data", self._pictures, "--out", out, "--method", method, "--config", settings]
        words += ["--max-steps", cell.warmup + cell.steps, "--batch-size", cell.rows, "--home", work.home]
        _, peak = run([*OFFSITE, *map(str, words)])
        marks = [record for record in map(json.loads, log.read_text().splitlines()) if record["event"] == "step"]
        timed = marks[cell.warmup - 1 :]
        seconds = [round(after["time"] - before["time"], 4) for before, after in itertools.pairwise(timed)]
        self._require_all(sum(mark["labels"] for mark in timed[1:]))
        return {"seconds": seconds, "peak_bytes": peak, "losses": [round(mark["loss"], 4) for mark in marks]}

    def _peer(self, key: str, method: str, settings: Mapping[str, Any], *, may_fail: bool = False) -> dict[str, Any]:
        """Run a peer, or read the saved result of that run.

        Args:
            key: the name of the run in the work folder.
            method: "full" or "lora".
            settings: the peer's settings, with its batch size.
            may_fail: whether a run that does not fit into memory returns {"fits": False}, and no error is raised.
        """
        cell = self._cell
        wanted = {
            "base": str(self._base), "pictures": str(self._pictures), "method": method, "batch": settings["batch"],
            "per_step": cell.rows, "warmup": cell.warmup, "steps": cell.steps, "threads": self._work.threads,
            "keep_freed": settings["keep_freed"], "bf16": settings["bf16"], "attention": settings["attention"],
            "out": str(self._work.folder / "trainer"),
        }  # fmt: skip

        def measure() -> dict[str, Any]:
            command = [sys.executable, "-m", "benchmarks.image_peers", json.dumps(wanted)]
            try:
                output, peak = run(command, {"OMP_WAIT_POLICY": settings["wait"]})
            except ChildError as error:
                if may_fail and error.no_memory:
                    return {"fits": False}
                raise
            found: dict[str, Any] = last_line(output)
            self._require_all(found["pictures"])
            return {**found, "peak_bytes": peak, "fits": True}

        texts = [(Path(__file__).parent / name).read_text() for name in ("image_peers.py", "peers.py")]
        return self._work.once(key, [wanted, settings["wait"], digest(texts), code_digest()], measure)

    def _require_all(self, pictures: int) -> None:
        """Exit if the measured steps of a run did not have all the pictures that they should have."""
        if pictures != self._cell.rows * self._cell.steps:
            sys.exit(f"{self._cell.shape}: {pictures} pictures in the steps on the clock, not all of them")

    def _habits_of(self, name: str) -> dict[str, Any]:
        """The fastest settings and batch size of a peer, as found by its calibration."""
        habits = HABITS if self._quick else self._settled(name)
        if len(self._cell.batches) == 1:
            return {**habits, "batch": self._cell.batches[0]}
        tried = {
            batch: self._speed(name, f"{batch} at once", {**habits, "batch": batch}) for batch in self._cell.batches
        }
        return {**habits, "batch": max(tried, key=lambda batch: tried[batch])}

    def _settled(self, method: str) -> dict[str, Any]:
        """The fastest settings of a peer, apart from the batch size, as found by a calibration in the first cell."""
        if self._cell != FIRST:
            return Measurements(self._work, FIRST, quick=False)._settled(method)
        most = max(FIRST.batches)
        return fastest_habits(lambda key, habits: self._speed(method, key, {**habits, "batch": most}))

    def _speed(self, method: str, key: str, settings: Mapping[str, Any]) -> float:
        """Images per second of a peer's calibration run; 0 if it does not fit into this machine's memory."""
        key = f"images/{self._cell.shape}/{method}/calibration/{key}"
        found = self._peer(key, method, settings, may_fail=True)
        return float(found["pictures"] / sum(found["seconds"])) if found["fits"] else 0.0


def operations(base: Path, contestant: str) -> float:
    """Operations per image that one contestant needs, counted from the base's config and headers.

    The embedding of patches is counted for the forward pass, and in full fine-tuning also for the gradient of its
    weight. The classifier is not counted.

    Args:
        base: the base folder of the encoder.
        contestant: its name, such as "lora" (on the whole encoder) or "offsite lora, 4-4-4" (on a bundle).
    """
    from offsite.models.families.architectures import architecture_of
    from offsite.storage.checkpoint_folder import open_checkpoint

    config = json.loads((base / "config.json").read_text())
    family, tensors = architecture_of(config), open_checkpoint(base).tensors
    held = {family.name_of(name) or name: tensor.shape for name, tensor in tensors.items()}
    sizes = [held[family.in_block(0, f"{path}.weight")] for path in family.linears]
    patches = (config["image_size"] // config["patch_size"]) ** 2
    tokens, blocks = patches + 1, family.block_count(config)  # a class token is among them
    bottom, keep, top = (blocks, 0, 0) if contestant in BEST else split_of(contestant)
    shape = Shape(
        blocks=blocks,
        kept=bottom + keep + top,
        trained=bottom + top,
        below=0 if bottom else keep,
        block=sum(outputs * inputs for outputs, inputs in sizes),
        pairs=sum(outputs + inputs for outputs, inputs in sizes),
        attended=config["hidden_size"],
        head=0,
        tokens=tokens,
        context=tokens,
        labelled=0,
    )
    embedding = config["hidden_size"] * config.get("num_channels", 3) * config["patch_size"] ** 2
    if contestant in BEST:
        return tokens * peer(shape, contestant, RANK) + patches * embedding * (4 if contestant == "full" else 2)
    return tokens * ours(shape, contestant.split(", ")[0].split()[1], RANK) + patches * embedding * 2


def table(results: Mapping[str, Any]) -> str:
    """Format the results as Markdown, with a table for each encoder."""
    lines = []
    for shape in dict.fromkeys(record["shape"] for record in results["records"]):
        records = [record for record in results["records"] if record["shape"] == shape]
        one = records[0]
        about = f"**{shape}**: {one['images_of_a_step']} images of {one['side']} pixels a step; {said_products(one)}"
        lines += [about, "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        for record in records:
            low, high = record["spread"]
            pair = [" / ".join(f"{record.get(f'{what}_vs_{rival}', '-')}" for rival in BEST)
                    for what in ("speed", "counted_bound", "memory")]  # fmt: skip
            lines.append(
                f"| {record['contestant']} | {record['images_per_s']:.2f} ({low:.2f} to {high:.2f}) "
                f"| {record['peak_bytes'] / 2**30:.2f} | {percent(record['share_of_peak'])} "
                f"| {pair[0]} | {pair[1]} | {pair[2]} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
