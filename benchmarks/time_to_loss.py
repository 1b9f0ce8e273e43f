"""Measures how long tuning takes to reach a held-out loss, on bundles with several emulators and on the full model.

    python -m benchmarks.time_to_loss --data-root ../shared/data

The model is SmolLM2-135M, the data set E2E (descriptions of restaurants); a run has 60 steps of 16 rows, and four
checkpoints. For offsite, the plug-in of each checkpoint of a return is scored. The peers are transformers' Trainer in
its fastest configuration, as in `benchmarks.tuning`, and their tuned model itself is scored. Time counts from the first
step, without the time in which a peer writes a checkpoint. Packing, which the model's owner does once for each bundle,
is shown separately. An interrupted run continues.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compared import fastest_habits
from benchmarks.work import OFFSITE, ROOT, Work, code_digest, commit, digest, last_line, machine, run, versions

RESULT = Path(__file__).parent / "results" / "time_to_loss.json"
PLOT = ROOT / "docs" / "time-to-loss.png"
DATA = "e2e_nlg"
STEPS, ROWS, CHECKPOINTS, TEST_ROWS = 60, 16, 4, 100
_TWO = ("--bottom", 2, "--top", 2)
BUNDLES: Mapping[str, tuple[object, ...]] = {  # name -> flags of `pack`
    "keep 4": (*_TWO, "--keep", 4),  # of the 26 in the middle
    "keep 8": (*_TWO, "--keep", 8),
    "half pruned": _TWO,
    "half pruned, 4 + 6": (),  # the defaults
}
LEARNING_RATES = {"full": 1e-4, "lora": 1e-3}
BATCHES = (4, 16)  # rows at once that peers try
_COLOURS = ("#000000", "#7f7f7f", "#56b4e9", "#0072b2", "#009e73", "#d55e00")  # Okabe and Ito's
_NAMES = {"full": "full fine-tuning", "lora": "LoRA on the full model"}


def main() -> None:
    """Measure what the work folder does not have yet; write the result file and the plot, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=lambda path: Path(path).resolve(), default=ROOT.parent / "shared" / "data")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("offsite-bench"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    wanted = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(wanted.threads), "HF_HUB_OFFLINE": "1"}
    race = Race(Work(wanted.work, wanted.threads), wanted.data_root)
    records = [race.peer(method) for method in LEARNING_RATES] + [race.ours(name) for name in BUNDLES]
    result = {
        "machine": machine(wanted.threads), "versions": versions(), "commit": commit(),
        "written_at": time.strftime("%Y-%m-%d"), "zero_shot": race.zero_shot(), "records": records,
    }  # fmt: skip
    wanted.result.parent.mkdir(parents=True, exist_ok=True)
    wanted.result.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, wanted.plot)
    print(table(result))


class Race:
    """Measures the peers and the bundles on the same rows."""

    def __init__(self, work: Work, root: Path) -> None:
        self._work, self._base = work, work.base("smollm2")
        self._rows = self._some(work.source(root, DATA), STEPS * ROWS)
        self._test = self._some(root / DATA / "test.jsonl", TEST_ROWS)
        self._of = [digest(self._rows.read_text()), digest(self._test.read_text()), STEPS, ROWS, CHECKPOINTS]

    def zero_shot(self) -> float:
        """The held-out loss of the base, in nats per labelled token."""
        return self._work.once("race/zero-shot", [*self._of, code_digest()], lambda: {"loss": self._loss(self._base)})[
            "loss"
        ]

    def peer(self, method: str) -> dict[str, Any]:
        """Train a peer (transformers' Trainer on the full model).

        Args:
            method: "full" or "lora".

        Returns:
            The record for the result file: held-out loss and seconds at each checkpoint.
        """
        steps = [STEPS * (i + 1) // CHECKPOINTS for i in range(CHECKPOINTS)]
        habits = self._fastest(method)
        wanted = self._wanted(method, habits, warmup=0, steps=STEPS) | {"save": steps}
        out = Path(wanted["out"])

        def measure() -> dict[str, Any]:
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, "-m", "benchmarks.peers", json.dumps(wanted)]
            output, peak = run(command, {"OMP_WAIT_POLICY": habits["wait"]})
            seconds, losses = last_line(output)["seconds"], []
            for step in steps:
                folder = out / f"step-{step}"
                for file in self._base.glob("*.json*"):
                    if file.name.startswith(("tokenizer", "chat")):
                        shutil.copy(file, folder)
                losses.append(self._loss(folder))
            shutil.rmtree(out)
            return {
                "steps": steps, "seconds": [round(sum(seconds[:step]), 1) for step in steps],
                "losses": losses, "peak_bytes": peak,
            }  # fmt: skip

        found = self._work.once(f"race/{method}", [*self._of, wanted, habits["wait"]], measure)
        return {"name": _NAMES[method], **_shown(found), "settings": habits}

    def _wanted(self, method: str, habits: Mapping[str, Any], *, warmup: int, steps: int) -> dict[str, Any]:
        """The JSON object that describes a measurement to `benchmarks.peers`."""
        return {
            "base": str(self._base), "rows": str(self._rows), "method": method, "batch": habits["batch"],
            "per_step": ROWS, "warmup": warmup, "steps": steps, "seed": 0, "pad_to": None,
            "threads": self._work.threads, "keep_freed": habits["keep_freed"], "bf16": habits["bf16"],
            "attention": habits["attention"], "lr": LEARNING_RATES[method], "out": str(self._work.folder / "race"),
        }  # fmt: skip

    def _fastest(self, method: str) -> dict[str, Any]:
        """The fastest settings and batch size of a peer on these rows, by a short run for each choice."""

        def speed(key: str, habits: Mapping[str, Any]) -> float:
            wanted = self._wanted(method, {"batch": ROWS, **habits}, warmup=1, steps=2)

            def measure() -> dict[str, Any]:
                command = [sys.executable, "-m", "benchmarks.peers", json.dumps(wanted)]
                return dict(last_line(run(command, {"OMP_WAIT_POLICY": habits["wait"]})[0]))

            key = f"race/{method}/calibration/{key}"
            found = self._work.once(key, [*self._of, wanted, habits["wait"]], measure)
            return float(found["tokens"] / sum(found["seconds"]))

        habits = fastest_habits(speed)
        tried = {batch: speed(f"{batch} at once", {**habits, "batch": batch}) for batch in BATCHES}
        return {**habits, "batch": max(tried, key=lambda batch: tried[batch])}

    def ours(self, name: str) -> dict[str, Any]:
        """Tune a bundle; returns its record for the result file: the plug-in's loss and the seconds at each checkpoint.

        Args:
            name: the name of the bundle, a key of `BUNDLES`.
        """

        def measure() -> dict[str, Any]:
            folder = self._work.folder / "race"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            bundle, returned, log = folder / "bundle", folder / "return", folder / "return.log.jsonl"
            self._work.bundle("smollm2")  # which makes both homes
            owner = self._work.folder / "owner"
            began = time.perf_counter()
            self._offsite("pack", self._base, "--out", bundle, "--for", "tuner", *BUNDLES[name], "--home", owner)
            packing = time.perf_counter() - began
            peak = self._offsite(
                "tune", bundle, "--data", self._rows, "--out", returned, "--max-steps", STEPS, "--batch-size", ROWS,
                "--checkpoints", CHECKPOINTS, "--home", self._work.home,
            )  # fmt: skip
            marks = [json.loads(line) for line in log.read_text().splitlines()]
            started = next(mark["time"] for mark in marks if mark["event"] == "start")
            ends = {mark["step"]: mark["time"] - started for mark in marks if mark["event"] == "step"}
            steps, losses = [STEPS * (i + 1) // CHECKPOINTS for i in range(CHECKPOINTS)], []
            for number in range(1, CHECKPOINTS + 1):
                plugged = folder / f"plugged-{number}"
                self._offsite(
                    "plug-in", self._base, returned, "--out", plugged, "--as", "merged", "--checkpoint", number,
                    "--again", "--home", owner,
                )  # fmt: skip
                losses.append(self._loss(plugged))
                shutil.rmtree(plugged)
            size = sum(file.stat().st_size for file in bundle.iterdir())
            shutil.rmtree(folder)
            return {
                "steps": steps, "seconds": [round(ends[step], 1) for step in steps], "losses": losses,
                "peak_bytes": peak, "packing_seconds": round(packing, 1), "bundle_bytes": size,
            }  # fmt: skip

        found = self._work.once(f"race/{name}", [*self._of, BUNDLES[name], code_digest()], measure)
        return {"name": f"offsite, LoRA, {name}", **_shown(found)}

    def _some(self, source: Path, count: int) -> Path:
        """Write at most `count` lines of a file, spread evenly over it, to a new file; returns its path."""
        lines = source.read_text(encoding="utf-8").splitlines()
        chosen = [lines[int((i + 0.5) * len(lines) / count)] for i in range(count)] if len(lines) > count else lines
        target = self._work.folder / f"race-{source.name}"
        target.write_text("\n".join(chosen) + "\n", encoding="utf-8")
        return target

    def _loss(self, model: Path) -> float:
        """The held-out loss of a model by `offsite eval`, in nats per labelled token."""
        output, _ = run([*OFFSITE, "eval", str(model), "--data", str(self._test), "--json"])
        return round(float(json.loads(output)["loss"]), 4)

    @staticmethod
    def _offsite(*words: object) -> int:
        """Run an `offsite` command; returns its peak resident memory in bytes."""
        return run([*OFFSITE, *map(str, words)])[1]


def _shown(found: Mapping[str, Any]) -> dict[str, Any]:
    """A saved measurement without the entries that identify it in the work folder."""
    return {key: value for key, value in found.items() if key not in ("key", "of", "at")}


def reached(record: Mapping[str, Any], zero_shot: float, loss: float) -> float | None:
    """The seconds until a run reached a loss, interpolated linearly between checkpoints; None if it never did.

    Args:
        record: the run's record, with the seconds and the losses at its checkpoints.
        zero_shot: the loss at 0 seconds.
        loss: the loss to reach.
    """
    points = [(0.0, zero_shot), *zip(record["seconds"], record["losses"], strict=True)]
    for (began, before), (ended, after) in itertools.pairwise(points):
        if after <= loss:
            return float(began + (ended - began) * (before - loss) / (before - after)) if before > loss else began
    return None


def table(result: Mapping[str, Any]) -> str:
    """Format the result as a Markdown table, one row for each contestant."""
    records, zero = result["records"], result["zero_shot"]
    gain = zero - min(records[0]["losses"])
    shares = (0.5, 0.7, 0.8)
    lines = [
        f"Zero-shot {zero:.3f} nats per labelled token; full fine-tuning gains {gain:.3f}.", "",
        "| | " + " | ".join(f"s to {100 * share:.0f} % of that gain" for share in shares)
        + " | loss at the end | s | peak, GiB | packing, s | bundle, MiB |",
        "|---" * (len(shares) + 6) + "|",
    ]  # fmt: skip
    for record in records:
        times = [reached(record, zero, zero - share * gain) for share in shares]
        packing, size = record.get("packing_seconds"), record.get("bundle_bytes")
        cells = [f"{time:.0f}" if time is not None else "not reached" for time in times]
        cells += [
            f"{record['losses'][-1]:.3f}", f"{record['seconds'][-1]:.0f}", f"{record['peak_bytes'] / 2**30:.2f}",
            f"{packing:.0f}" if packing else "-", f"{size / 2**20:.0f}" if size else "-",
        ]  # fmt: skip
        lines.append(f"| {record['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Plot held-out loss over seconds of tuning, a line for each contestant, and save the plot to a file."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    styles: Sequence[str] = ("s--", "D--", *("o-" for _ in result["records"][len(LEARNING_RATES) :]))
    for record, colour, style in zip(result["records"], _COLOURS, styles, strict=False):
        seconds, losses = [0.0, *record["seconds"]], [result["zero_shot"], *record["losses"]]
        axes.plot(seconds, losses, style, color=colour, label=record["name"], markersize=4)
    axes.set(xlabel="seconds of tuning", ylabel="held-out loss, nats per labelled token")
    axes.set_title("Plug-ins against tuning the full model", loc="left", fontweight="bold", fontsize=10)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6")
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)


if __name__ == "__main__":
    main()
