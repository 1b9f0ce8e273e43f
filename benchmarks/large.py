"""Measures time and memory of packing and plugging in a large checkpoint, beside `cp` and `offsite verify`.

    python -m benchmarks.large                          a model of Llama 2's 7B: 13 GB, four times that on the disk
    python -m benchmarks.large --size 1.3b              a smaller one
    python -m benchmarks.large --size 7b --blocks 3     blocks and head of the 7B, but fewer blocks

The checkpoint is random, in bf16 and in shards. Every command runs in a process of its own, one at a time; its peak is
the ru_maxrss that the system reports when it ends. All files are removed at the end.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "large.json"
_ROOT = Path(__file__).parent.parent
_RANK = 16
_RETURN = """
import sys
from pathlib import Path
from artifacts import lora_return
from offsite.protocol.home import Home
from offsite.protocol.verify import verify_bundle
bundle, out, home, rank = Path(sys.argv[1]), Path(sys.argv[2]), Home(Path(sys.argv[3])), int(sys.argv[4])
lora_return(verify_bundle(bundle, home), out, home, rank=rank, b=0.01)
"""


@dataclass(frozen=True)
class Measured:
    """The seconds of one command, and its peak resident memory in bytes."""

    case: str
    seconds: float
    peak: int


def main() -> None:
    """Measure every command, print a line for each, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="7b", help="shape of the model: 1.3b, 7b, 13b or 70b")
    parser.add_argument("--blocks", type=int, default=None, help="number of blocks, by default the model's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="folder on the disk to use, by default the system's")
    parser.add_argument("--result", type=Path, default=RESULT)
    wanted = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(wanted.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT / "src"), str(_ROOT), str(_ROOT / "tests")])
    results = []
    with tempfile.TemporaryDirectory(prefix="offsite-large-", dir=wanted.folder) as scratch:
        base = Path(scratch) / "base"
        blocks = ["--blocks", str(wanted.blocks)] if wanted.blocks else []
        _run([sys.executable, "-m", "benchmarks.large_base", wanted.size, base, *blocks])
        size = sum(file.stat().st_size for file in base.iterdir())
        if shutil.disk_usage(scratch).free < 4 * size:
            raise SystemExit(f"needs {4 * size / 1e9:.0f} GB more on the disk of {scratch}; choose --folder or --size")
        print(f"{size / 1e9:.2f} GB\n{'command':36}{'seconds':>9}{'peak':>12}")
        for one in _measure(base, Path(scratch)):
            results.append(one)
            print(f"{one.case:36}{one.seconds:>9.1f}{one.peak / 2**20:>8,.0f} MiB", flush=True)
    _write(wanted, size, results)


def _measure(base: Path, scratch: Path) -> Iterator[Measured]:
    """Copy, pack, verify and plug in, one command after the other; yields the measurement of each."""
    acme, hospital = scratch / "acme", scratch / "hospital"
    for home, name in ((acme, "acme"), (hospital, "hospital")):
        _run(_offsite("keygen", "--name", name, "--out", scratch / f"{name}.pub", "--home", home))
    for home, name in ((acme, "hospital"), (hospital, "acme")):
        _run(_offsite("trust", "add", name, scratch / f"{name}.pub", "--home", home))
    count = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    bundle, returned = scratch / "bundle", scratch / "return"
    copy = scratch / "copy"
    yield _measured("cp", ["cp", "-r", base, copy])
    shutil.rmtree(copy)
    settings = ["--bottom", 1, "--top", 1, "--keep", count - 2, "--heal", "none", "--no-score"]
    words = _offsite("pack", base, "--out", bundle, "--for", "hospital", "--home", acme, *settings)
    yield _measured("pack --keep all --heal none", words)
    yield _measured("verify", _offsite("verify", bundle, "--home", hospital))
    _run([sys.executable, "-c", _RETURN, bundle, returned, hospital, _RANK])
    shutil.rmtree(bundle)
    for form in ("adapter", "merged"):
        out = scratch / form
        words = _offsite("plug-in", base, returned, "--out", out, "--as", form, "--again", "--home", acme)
        yield _measured(f"plug-in --as {form}", words)
        shutil.rmtree(out)


def _measured(case: str, words: Sequence[object]) -> Measured:
    """Run a command in a process of its own; `case` is its name in the table."""
    began = time.perf_counter()
    peak = _run(words)
    return Measured(case, round(time.perf_counter() - began, 1), peak)


def _run(words: Sequence[object]) -> int:
    """Run a command; returns its peak resident memory in bytes, as the system reports it for its process."""
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(map(str, words))}: exit code {child.returncode}\n{said.read()}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _offsite(*words: object) -> list[object]:
    """The command line for an `offsite` command."""
    return [sys.executable, "-m", "offsite", *words]


def _write(wanted: argparse.Namespace, size: int, results: Sequence[Measured]) -> None:
    """Write the measurements to a JSON file, with the machine, the library versions and the shape of the model.

    The ratio of a command is its time divided by that of `cp` and `offsite verify` together.
    """
    names = ("offsite-tuning", "torch", "transformers", "numpy")
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    peers = sum(one.seconds for one in results if one.case in ("cp", "verify"))
    content = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {
            "system": platform.platform(),
            "processor": cpu.partition(": ")[2] or platform.processor(),
            "cores": os.cpu_count(),
        },
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names},
        "model": {"shape": wanted.size, "blocks": wanted.blocks or "all", "bytes": size, "rank of LoRA": _RANK},
        "threads": wanted.threads,
        "cases": [{**asdict(one), "ratio": round(one.seconds / peers, 2)} for one in results],
    }
    wanted.result.parent.mkdir(parents=True, exist_ok=True)
    wanted.result.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
