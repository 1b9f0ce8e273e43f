"""What each piece of the tuning's speed and memory is worth: one is taken out at a time.

    python -m benchmarks.ablation --data-root ../shared/data

Every run is a process of its own, and cases take turns. A case replaces a function of the package, or a setting, before
it calls `offsite.tune` on the bundle that `benchmarks.tuning` made of SmolLM2-135M.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import tuning

RESULT = Path(__file__).parent / "results" / "ablation.json"
_WARMUP, _STEPS, _ROWS = 1, 3, 8


def _nothing() -> None:
    pass


def _without_fusing() -> None:
    from offsite.data_owner import tune

    tune.fuse = lambda model: 0


def _without_short_attention() -> None:
    from offsite.data_owner import tune

    tune.use_short_attention = lambda model: None  # type: ignore[assignment]


def _without_kept_memory() -> None:
    from offsite.core import runtime

    runtime._keep_freed_memory = lambda: None  # type: ignore[assignment]


def _without_bounded_kernels() -> None:
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "1024"  # oneDNN's own default


def _head_everywhere() -> None:
    import numpy as np

    from offsite.core.data import Batch
    from offsite.data_owner import train

    collate = train.collate

    def everywhere(examples: Any) -> Batch:
        batch = collate(examples)
        rest = np.setdiff1d(np.flatnonzero(batch.mask), batch.places)  # its labels are only there to be paid for
        places, owners = (
            np.concatenate([batch.places, rest]),
            np.concatenate([batch.owners, rest // batch.ids.shape[1]]),
        )
        targets = np.concatenate([batch.targets, batch.ids.flatten()[rest]])
        return Batch(batch.ids, batch.mask, places, targets, owners)

    train.collate = everywhere


# name -> (what is done before, settings of the tuning)
CASES: Mapping[str, tuple[Callable[[], None], Mapping[str, Any]]] = {
    "as it is": (_nothing, {}),
    "norms, activations and MLPs as the family writes them": (_without_fusing, {}),
    "torch's own attention": (_without_short_attention, {}),
    "freed memory given back": (_without_kept_memory, {}),
    "compiled products of all shapes kept": (_without_bounded_kernels, {}),
    "head at every position": (_head_everywhere, {}),
    "512 tokens at once": (_nothing, {"micro_batch_tokens": 512}),
    "8192 tokens at once": (_nothing, {"micro_batch_tokens": 8192}),
    "blocks recomputed": (_nothing, {"gradient_checkpointing": True}),
    "fp32": (_nothing, {"compute": "fp32"}),
    "the blocks' own weights (full)": (_nothing, {"method": "full"}),
}


def main() -> None:
    """Measure every case, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=tuning._ROOT.parent / "shared" / "data")
    parser.add_argument("--data", default="gsm8k")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("offsite-bench"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    wanted.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": str(wanted.threads), "HF_HUB_OFFLINE": "1"}
    work = tuning._Work(wanted.work, wanted.threads)
    rows = work.rows(wanted.data_root / wanted.data / "train.jsonl", wanted.data)
    if wanted.child:
        print(json.dumps(_child(wanted.child, work, rows)))
        return
    work.bundle("smollm2")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    command = [sys.executable, "-m", "benchmarks.ablation", *sys.argv[1:], "--child"]
    for _ in range(wanted.repetitions):
        for name, runs in found.items():
            done = subprocess.run([*command, name], cwd=tuning._ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(name, runs[-1], flush=True)
    records = [
        {
            "case": name,
            "tokens_per_s": round(statistics.median(run["tokens_per_s"] for run in runs), 1),
            "spread": [round(pick(run["tokens_per_s"] for run in runs), 1) for pick in (min, max)],
            "peak_bytes": int(statistics.median(run["peak_bytes"] for run in runs)),
            "loss": runs[0]["loss"],
        }
        for name, runs in found.items()
    ]
    result = {"machine": tuning._machine(wanted.threads), "data": wanted.data, "records": records}
    wanted.result.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def _child(name: str, work: "tuning._Work", rows: Path) -> dict[str, float]:
    prepare, settings = CASES[name]
    prepare()
    from offsite import Home, TuneSpec, tune

    spec = TuneSpec(
        **{"max_steps": _WARMUP + _STEPS, "batch_size": _ROWS, "long_rows": "truncate", "save_every": 10**6, **settings}
    )
    with tempfile.TemporaryDirectory(prefix="offsite-ablation-") as scratch:
        out = Path(scratch) / "return"
        tune(work.bundle("smollm2"), rows, out, spec, Home(work.folder / "tuner"))
        lines = out.with_name("return.log.jsonl").read_text().splitlines()
    marks = [record for record in map(json.loads, lines) if record["event"] == "step"]
    tokens = sum(record["tokens"] for record in marks[_WARMUP:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    speed = tokens / (marks[-1]["time"] - marks[_WARMUP - 1]["time"])
    return {"tokens_per_s": speed, "peak_bytes": peak, "loss": round(marks[0]["loss"], 4)}


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
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
