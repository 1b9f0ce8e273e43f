"""Measures what each optimisation contributes to the speed and memory of tuning: one at a time is switched off.

    python -m benchmarks.ablation --data-root ../shared/data

Every run is a process of its own, the cases take turns, and an interrupted run continues. A case replaces a function of
the package, or changes a setting, before it calls `offsite.tune` on a bundle of SmolLM2-135M.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell
from benchmarks.work import ROOT, Work, code_digest, commit, digest, last_line, machine, run, versions

RESULT = Path(__file__).parent / "results" / "ablation.json"
_WARMUP, _STEPS, _ROWS = 1, 3, 8


def _nothing() -> None:
    pass


def _without_fusing() -> None:
    """Keep the norms, activations and MLPs of transformers."""
    from offsite.kernels.cpu import prepare_for_cpu

    prepare_for_cpu.fuse = lambda model: ()


def _without_own_attention() -> None:
    """Keep the attention of torch (SDPA)."""
    from offsite.kernels import Piece
    from offsite.kernels.cpu import prepare_for_cpu

    prepare_for_cpu.use_tiled_attention = lambda model: Piece("attention", 0, "taken out")


def _without_kernels() -> None:
    """Switch all compiled kernels off."""
    from offsite.kernels.cpu import compiled_kernels as kernels

    kernels.level = lambda: (0, "taken out")  # type: ignore[assignment]


def _without_compiled_attention() -> None:
    """Switch the compiled attention off, so that attention consists of torch's matrix products."""
    from offsite.kernels.cpu import compiled_kernels as kernels

    kernels.attends = lambda *tensors: False  # type: ignore[assignment]


def _without_tiles() -> None:
    """Use torch's matrix products for attention, and store all probabilities of sequences up to 448 tokens."""
    from offsite.kernels.cpu import tiled_attention

    _without_compiled_attention()
    tiled_attention.TILE = tiled_attention._LONGEST


def _odd_rows() -> None:
    """Use torch's matrix products for attention, and let a tile see any number of keys, not only multiples of 16."""
    from offsite.kernels.cpu import tiled_attention

    _without_compiled_attention()
    tiled_attention._EVEN = 1


def _torchs_dropout() -> None:
    """Use torch's own dropout."""
    from offsite.kernels.cpu import side_by_side

    side_by_side.OwnRandomness = lambda seed: contextlib.nullcontext()  # type: ignore[assignment,misc]


def _without_kept_memory() -> None:
    """Let the C allocator return freed memory to the system."""
    from offsite.kernels.cpu import allocator

    allocator.keep_freed_memory = lambda: None  # type: ignore[assignment]


def _without_bounded_kernels() -> None:
    """Set the caches of oneDNN's compiled kernels to their default size."""
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ[cache] = "1024"  # their own default


def _without_lean_pairs() -> None:
    """Keep PEFT's LoRA layers."""
    from offsite.kernels import Piece
    from offsite.kernels.cpu import prepare_for_cpu

    prepare_for_cpu.replace_lora_layers = lambda model: Piece("LoRA layers", 0, "taken out")


def _padded_to_the_budget() -> None:
    from offsite.data import batches

    batches._PASS = 10**9


def _head_everywhere() -> None:
    """Run the head on every token, not only on labelled ones."""
    import numpy as np

    from offsite.data.batches import Batch
    from offsite.data_owner import text_task

    collate = text_task.collate

    def everywhere(examples: Any) -> Batch:
        batch = collate(examples)
        rest = np.setdiff1d(np.flatnonzero(batch.mask), batch.places)  # its labels are only there to be paid for
        places, owners = (
            np.concatenate([batch.places, rest]),
            np.concatenate([batch.owners, rest // batch.ids.shape[1]]),
        )
        targets = np.concatenate([batch.targets, batch.ids.flatten()[rest]])
        return Batch(batch.ids, batch.mask, places, targets, owners)

    text_task.collate = everywhere


# name -> (what is done before, settings of the tuning)
CASES: Mapping[str, tuple[Callable[[], None], Mapping[str, Any]]] = {
    "as it is": (_nothing, {}),
    "norms, activations and MLPs as the family writes them": (_without_fusing, {}),
    "LoRA pairs as PEFT runs them": (_without_lean_pairs, {}),
    "nothing compiled": (_without_kernels, {}),
    "attention of torch's products": (_without_compiled_attention, {}),
    "attention of torch's products, shares kept": (_without_tiles, {}),
    "attention of torch's products, rows of shares of odd lengths": (_odd_rows, {}),
    "torch's own attention": (_without_own_attention, {}),
    "freed memory given back": (_without_kept_memory, {}),
    "compiled products of all shapes kept": (_without_bounded_kernels, {}),
    "as few passes as fit": (_padded_to_the_budget, {}),
    "head at every position": (_head_everywhere, {}),
    "512 tokens at once": (_nothing, {"micro_batch_tokens": 512}),
    "2048 tokens at once": (_nothing, {"micro_batch_tokens": 2048}),
    "4096 tokens at once": (_nothing, {"micro_batch_tokens": 4096}),
    "8192 tokens at once": (_nothing, {"micro_batch_tokens": 8192}),
    "one micro-batch after the other": (_nothing, {"lanes": 1}),
    "dropout before the pairs": (_nothing, {"lora_dropout": 0.1}),
    "dropout before the pairs, torch's": (_torchs_dropout, {"lora_dropout": 0.1}),
    "blocks recomputed": (_nothing, {"gradient_checkpointing": True}),
    "one thread": (_nothing, {"threads": 1}),
    "fp32": (_nothing, {"compute": "fp32"}),
    "fp32, 1024 tokens at once": (_nothing, {"compute": "fp32", "micro_batch_tokens": 1024}),
    "the blocks' own weights (full)": (_nothing, {"method": "full"}),
    "threads that sleep at once when they wait": (_nothing, {}),
}
_ENVIRONMENTS = {"threads that sleep at once when they wait": {"GOMP_SPINCOUNT": "0"}}


def main() -> None:
    """Measure every case, write the result as JSON and print it as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=lambda path: Path(path).resolve(), default=ROOT.parent / "shared" / "data")
    parser.add_argument("--data", default="gsm8k")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("offsite-bench"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=3, metavar=("CASE", "BUNDLE", "ROWS"), help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(wanted.threads), "HF_HUB_OFFLINE": "1"}
    if wanted.child:
        name, bundle, rows = wanted.child
        print(json.dumps(_child(name, Path(bundle), Path(rows), wanted.work / "tuner")))
        return
    work = Work(wanted.work, wanted.threads)
    rows = work.rows(Cell("smollm2", wanted.data, _WARMUP, _STEPS, (), rows=_ROWS), wanted.data_root)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted.cases}
    for repetition in range(wanted.repetitions):
        first = repetition % len(runs)
        for name in (*wanted.cases[first:], *wanted.cases[:first]):
            runs[name].append(_measured(work, name, wanted.data, rows, repetition))
    result = {
        "machine": machine(wanted.threads), "versions": versions(), "commit": commit(), "data": wanted.data,
        "records": [_record(name, found) for name, found in runs.items()],
    }  # fmt: skip
    wanted.result.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def _measured(work: Work, name: str, data: str, rows: Path, repetition: int) -> dict[str, Any]:
    """One run of a case in its own process (speed, first loss and peak memory), or the saved result of that run."""
    command = [sys.executable, "-m", "benchmarks.ablation", "--threads", str(work.threads), "--work", str(work.folder)]

    def measure() -> dict[str, Any]:
        child = [*command, "--child", name, str(work.bundle("smollm2")), str(rows)]
        output, peak = run(child, _ENVIRONMENTS.get(name))
        return {**last_line(output), "peak_bytes": peak}

    of = [code_digest(), Path(__file__).read_text(), digest(rows.read_text())]
    return work.once(f"ablation/{data}/{name}/{repetition}", of, measure)


def _record(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise the runs of a case: medians, and the lowest and highest speed."""
    speeds = [run["tokens_per_s"] for run in runs]
    return {
        "case": name,
        "tokens_per_s": round(statistics.median(speeds), 1),
        "spread": [round(min(speeds), 1), round(max(speeds), 1)],
        "peak_bytes": int(statistics.median(run["peak_bytes"] for run in runs)),
        "loss": runs[0]["loss"],
        "runs": [{key: run[key] for key in ("at", "tokens_per_s", "peak_bytes")} for run in runs],
    }


def _child(name: str, bundle: Path, rows: Path, home: Path) -> dict[str, float]:
    """Run one case in this process: tune for a few steps; returns tokens per second and the loss of the first step."""
    prepare, settings = CASES[name]
    prepare()
    from offsite import Home, TuneSpec, tune, verify_bundle

    spec = TuneSpec(
        **{"max_steps": _WARMUP + _STEPS, "batch_size": _ROWS, "long_rows": "truncate", "save_every": 10**6, **settings}
    )
    with tempfile.TemporaryDirectory(prefix="offsite-ablation-") as scratch:
        out = Path(scratch) / "return"
        tune(verify_bundle(bundle, Home(home)), rows, out, spec, Home(home))
        lines = out.with_name("return.log.jsonl").read_text().splitlines()
    marks = [record for record in map(json.loads, lines) if record["event"] == "step"]
    tokens = sum(record["tokens"] for record in marks[_WARMUP:])
    speed = tokens / (marks[-1]["time"] - marks[_WARMUP - 1]["time"])
    return {"tokens_per_s": round(speed, 2), "loss": round(marks[0]["loss"], 4)}


def table(result: Mapping[str, Any]) -> str:
    """Format the result as a Markdown table, one row for each case."""
    first = result["records"][0]
    lines = [
        "| case | tokens/s (least to most) | speed | peak, MiB | loss of the first step |",
        "|---|---|---|---|---|",
    ]
    for record in result["records"]:
        low, high = record["spread"]
        lines.append(
            f"| {record['case']} | {record['tokens_per_s']:.0f} ({low:.0f} to {high:.0f}) "
            f"| {100 * record['tokens_per_s'] / first['tokens_per_s']:.0f} % | {record['peak_bytes'] / 2**20:.0f} "
            f"| {record['loss']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
