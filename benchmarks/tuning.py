"""Speed and memory of `offsite tune` against full fine-tuning and LoRA on the full model, side by side.

    python -m benchmarks.tuning --data-root ../shared/data            everything (about 40 minutes on two cores)
    python -m benchmarks.tuning --shapes smollm2 --data sciq          one cell; without the padded peers, `make bench`

Peers are transformers' Trainer at its best (bf16 autocast, rows grouped by length, padded to the batch's longest, fused
AdamW, and the batch size that is fastest in a short calibration), and "padded to 512", as the paper's code feeds rows.
Every repetition is a process of its own, contestants take turns, and speeds are those of the steps after the warm-up.
An interrupted run continues: finished measurements lie in the work folder.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.counted import Shape, ours, peer

if TYPE_CHECKING:
    from offsite.core.data import Example

RESULT = Path(__file__).parent / "results" / "tuning.json"
RANK = 16
_ROOT = Path(__file__).parent.parent
_CODE = ["-c", "from offsite.cli import main; main()"]

# name -> split of the bundle, rows of a step, steps of warm-up, steps measured, batch sizes that peers try
SHAPES: Mapping[str, tuple[tuple[int, int, int], int, int, int, tuple[int, ...]]] = {
    "smollm2": ((2, 8, 2), 16, 1, 4, (4, 16)),
    "gpt2-large": ((2, 12, 2), 4, 1, 2, (1, 4)),
}
CONTESTANTS = ("full", "lora", "full, padded to 512", "lora, padded to 512", "offsite lora", "offsite full")
PEERS = CONTESTANTS[:4]
_COLUMNS = (
    "", "tokens/s (least to most)", "examples/s", "peak, GiB", "share of matrix-product peak",
    "speed against full / LoRA", "counted bound", "memory below full / LoRA",
)  # fmt: skip


def main() -> None:
    """Measure what is missing, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=_ROOT.parent / "shared" / "data")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--data", nargs="+", default=["sciq", "gsm8k"], help="folders with a train.jsonl")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("offsite-bench"), help="bases, bundles and measurements")
    parser.add_argument("--result", type=Path, default=RESULT)
    wanted = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(wanted.threads), "HF_HUB_OFFLINE": "1"}
    wanted.work.mkdir(parents=True, exist_ok=True)
    work = _Work(wanted.work, wanted.threads)
    for shape in wanted.shapes:
        for data in wanted.data:
            rows = work.rows(wanted.data_root / data / "train.jsonl", data)
            for repetition in range(wanted.repetitions):
                for contestant in wanted.contestants:
                    work.measure(shape, data, rows, contestant, repetition)
    work.measure_peak()
    results = _results(work)
    wanted.result.parent.mkdir(exist_ok=True)
    wanted.result.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


class _Work:
    """The work folder: what was made and measured so far."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder.resolve(), threads
        self._log = self.folder / "measurements.jsonl"
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self.records: dict[str, dict[str, Any]] = {record["key"]: record for record in map(json.loads, lines)}

    def note(self, key: str, record: Mapping[str, Any]) -> None:
        self.records[key] = {"key": key, **record}
        with self._log.open("a") as stream:
            stream.write(json.dumps(self.records[key]) + "\n")
        print(key, json.dumps(dict(record)), flush=True)

    def rows(self, source: Path, name: str) -> Path:
        """The rows' prompts and completions, in a file of their own."""
        target = self.folder / f"{name}.jsonl"
        if not target.exists():
            if not source.exists():
                sys.exit(f"no rows at {source}: name the folder of data sets with --data-root")
            with source.open() as lines:
                found = [json.loads(line) for line in lines]
            target.write_text("".join(json.dumps({k: r[k] for k in ("prompt", "completion")}) + "\n" for r in found))
        return target

    def measure(self, shape: str, data: str, rows: Path, contestant: str, repetition: int) -> None:
        key = f"{shape}/{data}/{contestant}/{repetition}"
        if key in self.records:
            return
        if contestant in PEERS:
            pad_to = 512 if "padded" in contestant else None
            method = contestant.split(",")[0]
            batch, keep = self._best(shape, data, rows, method) if pad_to is None else (SHAPES[shape][4][0], True)
            self.note(key, self._peer(shape, rows, method, batch, keep, pad_to, steps=SHAPES[shape][3]))
        else:
            self.note(key, self._ours(shape, rows, contestant.split()[1]))

    def _best(self, shape: str, data: str, rows: Path, method: str) -> tuple[int, bool]:
        """The peer's fastest batch size, and whether it too gains from keeping freed memory; found once."""
        key = f"{shape}/{data}/{method}/calibration"
        if key not in self.records:
            sizes = SHAPES[shape][4]
            tried = {(batch, True): self._peer(shape, rows, method, batch, True, None, steps=2) for batch in sizes}
            best = max(tried, key=lambda one: tried[one]["tokens"] / tried[one]["seconds"])
            tried[best[0], False] = self._peer(shape, rows, method, best[0], False, None, steps=2)
            best = max(tried, key=lambda one: tried[one]["tokens"] / tried[one]["seconds"])
            speeds = {f"{b}, {k}": round(r["tokens"] / r["seconds"], 1) for (b, k), r in tried.items()}
            self.note(key, {"batch": best[0], "keep_freed": best[1], "tokens_per_s": speeds})
        record = self.records[key]
        return record["batch"], record["keep_freed"]

    def _peer(
        self, shape: str, rows: Path, method: str, batch: int, keep: bool, pad_to: int | None, *, steps: int
    ) -> dict[str, Any]:
        _, per_step, warmup, _, _ = SHAPES[shape]
        settings = {
            "base": str(self.base(shape)), "data": str(rows), "method": method, "batch": batch, "rows": per_step,
            "warmup": 1 if pad_to else warmup, "steps": min(steps, 2) if pad_to else steps, "pad_to": pad_to,
            "threads": self.threads, "keep_freed": keep, "out": str(self.folder / "trainer"),
        }  # fmt: skip
        line, _ = _run([sys.executable, "-m", "benchmarks.peers", json.dumps(settings)])
        return {**json.loads(line.splitlines()[-1]), "batch": batch}

    def _ours(self, shape: str, rows: Path, method: str) -> dict[str, Any]:
        _, per_step, warmup, steps, _ = SHAPES[shape]
        bundle, out = self.bundle(shape), self.folder / "return"
        for left in (out, out.with_name("return.run")):
            shutil.rmtree(left, ignore_errors=True)
        log = out.with_name("return.log.jsonl")
        log.unlink(missing_ok=True)
        settings = self.folder / "settings.toml"
        settings.write_text('[tune]\nlong_rows = "truncate"\nsave_every = 1000000\n')
        words = ["tune", bundle, "--data", rows, "--out", out, "--method", method, "--config", settings]
        words += ["--max-steps", warmup + steps, "--batch-size", per_step, "--home", self.folder / "tuner"]
        _, peak = _run([sys.executable, *_CODE, *map(str, words)])
        marks = [record for record in map(json.loads, log.read_text().splitlines()) if record["event"] == "step"]
        tokens = sum(record["tokens"] for record in marks[warmup:])
        return {
            "seconds": marks[-1]["time"] - marks[warmup - 1]["time"],
            "tokens": tokens,
            "labels": sum(record["labels"] for record in marks[warmup:]),
            "peak_bytes": peak,
        }

    def base(self, shape: str) -> Path:
        """A base folder: real weights, or random ones in the published shape with a tokenizer that fits."""
        cached = self._smollm2()
        folder = self.folder / shape
        if shape == "smollm2":
            return cached
        if not folder.exists():
            _run([sys.executable, "-m", "benchmarks.random_base", shape, str(cached), str(folder)])
        return folder

    def _smollm2(self) -> Path:
        from offsite.study.pretrained import cached_smollm2

        def run(words: Sequence[str | Path]) -> None:
            _run([sys.executable, *_CODE, *map(str, words)])

        return cached_smollm2(lambda: print("downloading SmolLM2-135M-Instruct", flush=True), run)[0]

    def bundle(self, shape: str) -> Path:
        """A bundle of the base; how it is healed does not change its speed."""
        from offsite import Base, Home, PackSpec, pack

        folder = self.folder / f"{shape}-bundle"
        if not folder.exists():
            owner, tuner = Home(self.folder / "owner"), Home(self.folder / "tuner")
            if not owner.folder.exists():
                owner.create_identity("owner")
                owner.trust("tuner", tuner.create_identity("tuner").public_key)
                tuner.trust("owner", owner.identity().public_key)
            bottom, keep, top = SHAPES[shape][0]
            spec = PackSpec(bottom=bottom, keep=keep, top=top, heal="none")
            pack(Base(self.base(shape)), folder, "tuner", spec, owner)
        return folder

    def measure_peak(self) -> None:
        """The machine's own matrix products in bf16, with as many threads."""
        if "peak" in self.records:
            return
        code = (
            "import torch,time\n"
            f"torch.set_num_threads({self.threads})\n"
            "a=torch.randn(2048,2048).bfloat16()\nbest=9e9\n"
            "for i in range(30):\n"
            "    t=time.perf_counter(); torch.nn.functional.linear(a,a); best=min(best,time.perf_counter()-t)\n"
            "print(2*2048**3/best)"
        )
        self.note("peak", {"flops": float(_run([sys.executable, "-c", code])[0])})


def _run(command: Sequence[str]) -> tuple[str, int]:
    """Run a child; its standard output, and the peak resident bytes that the system counted."""
    process = subprocess.Popen(
        command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))  # type: ignore[union-attr]
        reader.start()
        output = process.stdout.read()
        reader.join()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)[:300]} failed:\n{errors[0][-3000:]}")
    return output, used.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _examples(work: _Work, shape: str, data: str) -> "tuple[Example, ...]":
    from offsite.core.data import encode
    from offsite.core.load import load_tokenizer
    from offsite.core.rows import read_rows

    file, tokenizer = work.folder / f"{data}.jsonl", load_tokenizer(work.base(shape))
    return encode(read_rows(file), tokenizer, source=file, max_length=1024, long_rows="truncate").examples


def _padding(examples: "tuple[Example, ...]", rows: int) -> float:
    """Padded tokens over real ones in an epoch of our tuning."""
    from offsite import TuneSpec
    from offsite.core.data import micro_batches, step_batches

    spec = TuneSpec()
    groups = [
        group
        for step in step_batches(examples, rows=rows, seed=spec.seed, epoch=0)
        for group in micro_batches(examples, step, spec.micro_batch_tokens)
    ]
    padded = sum(len(group) * max(len(examples[i].ids) for i in group) for group in groups)
    return padded / sum(len(example.ids) for example in examples)


def _shape(work: _Work, shape: str, found: "tuple[Example, ...]") -> Shape:
    from offsite.core.architectures import architecture_of
    from offsite.core.checkpoint import open_checkpoint

    folder = work.base(shape)
    config = json.loads((folder / "config.json").read_text())
    row, tensors = architecture_of(config), open_checkpoint(folder).tensors
    sizes = {path: next(t.shape for n, t in tensors.items() if n.endswith(f".0.{path}.weight")) for path in row.linears}
    vocabulary, hidden = tensors[next(n for n in tensors if n.endswith((".embed_tokens.weight", ".wte.weight")))].shape
    bottom, keep, top = SHAPES[shape][0]
    tokens = sum(len(example.ids) for example in found)
    return Shape(
        blocks=row.block_count(config),
        kept=bottom + keep + top,
        trained=bottom + top,
        block=sum(first * second for first, second in sizes.values()),
        pairs=sum(first + second for first, second in sizes.values()),
        attended=sizes[row.attention_out][0 if row.transposed else 1],
        head=vocabulary * hidden,
        tokens=tokens / len(found),
        labelled=sum(example.labels for example in found) / tokens,
    )


def _results(work: _Work) -> dict[str, Any]:
    import torch
    import transformers

    cells: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for key, record in work.records.items():
        if key.count("/") == 3 and not key.endswith("calibration"):
            shape, data, contestant, _ = key.split("/")
            cells.setdefault((shape, data), {}).setdefault(contestant, []).append(record)
    records = []
    for (shape, data), contestants in cells.items():
        examples = _examples(work, shape, data)
        counted = _shape(work, shape, examples)
        speeds = {name: [run["tokens"] / run["seconds"] for run in runs] for name, runs in contestants.items()}
        peaks = {name: statistics.median(run["peak_bytes"] for run in runs) for name, runs in contestants.items()}
        for name in contestants:
            speed, operations = statistics.median(speeds[name]), _operations(counted, name)
            record = {
                "shape": shape,
                "data": data,
                "contestant": name,
                "tokens_per_s": round(speed, 1),
                "examples_per_s": round(speed / counted.tokens, 3),
                "spread": [round(min(speeds[name]), 1), round(max(speeds[name]), 1)],
                "repetitions": len(speeds[name]),
                "batch": contestants[name][0].get("batch"),
                "padding": round(_padding(examples, SHAPES[shape][1]), 3) if name.startswith("offsite") else None,
                "peak_bytes": int(peaks[name]),
                "share_of_peak": round(speed * operations / work.records["peak"]["flops"], 3),
            }
            for rival in ("full", "lora"):
                for suffix, label in (("", rival), (", padded to 512", f"{rival}_padded")):
                    other = rival + suffix
                    if other in speeds:
                        bound = _operations(counted, other) / operations
                        ratio = speed / statistics.median(speeds[other])
                        record |= {
                            f"speed_vs_{label}": round(ratio, 2),
                            f"memory_vs_{label}": round(peaks[other] / peaks[name], 2),
                            f"counted_bound_vs_{label}": round(bound, 2),
                            f"share_of_bound_vs_{label}": round(ratio / bound, 2),
                        }
            records.append(record)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=False)
    return {
        "machine": _machine(work.threads),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit.stdout.strip(),
        "measured_at": time.strftime("%Y-%m-%d"),
        "matmul_peak_gflops": round(work.records["peak"]["flops"] / 1e9),
        "calibrations": {key: record for key, record in work.records.items() if key.endswith("calibration")},
        "records": records,
    }


def _operations(counted: Shape, contestant: str) -> float:
    if contestant.startswith("offsite"):
        return ours(counted, contestant.split()[1], RANK)
    return peer(counted, contestant.split(",")[0], RANK, 512 if "padded" in contestant else None)


def _machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return {
        "processor": model or platform.processor(),
        "instructions": sorted(set(flags) & {"amx_bf16", "avx512_bf16", "avx512f", "avx2"}),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "page_size": resource.getpagesize(),
    }


def table(results: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = []
    for shape, data in dict.fromkeys((record["shape"], record["data"]) for record in results["records"]):
        lines += [
            f"**{shape}, {data}**",
            "",
            f"| {' | '.join(_COLUMNS)} |",
            "|---" * len(_COLUMNS) + "|",
        ]
        for record in results["records"]:
            if (record["shape"], record["data"]) != (shape, data):
                continue
            low, high = record["spread"]
            pair = [" / ".join(f"{record.get(f'{what}_vs_{rival}', '-')}" for rival in ("full", "lora"))
                    for what in ("speed", "counted_bound", "memory")]  # fmt: skip
            lines.append(
                f"| {record['contestant']} | {record['tokens_per_s']:.0f} ({low:.0f} to {high:.0f}) "
                f"| {record['examples_per_s']:.2f} | {record['peak_bytes'] / 2**30:.2f} "
                f"| {100 * record['share_of_peak']:.0f} % | {pair[0]} | {pair[1]} | {pair[2]} |"
            )
        padding = {
            record["padding"] for record in results["records"] if (record["shape"], record["data"]) == (shape, data)
        }
        lines += ["", *(f"Padded over real tokens in offsite's steps: {found}." for found in padding if found), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
