"""Compares the peak memory of packing and tuning, as the operating system reports it, with that of `--plan measure`.

    python -m benchmarks.memory                 the model of the demo, from the user's cache
    python -m benchmarks.memory --base FOLDER   any base folder; "tiny" makes a tiny random one
    python -m benchmarks.memory --base FOLDER --images FOLDER   an image encoder, and pictures by class

Each command runs in a process of its own, one at a time; its peak is the ru_maxrss that the system reports when it
ends. This script imports nothing large, since the peak of a child includes the memory of its parent at the fork. If a
command runs no network, its plan measures nothing, and its line has only the system's figures.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "memory.json"
_ROOT = Path(__file__).parent.parent
_TEXT = _ROOT / "src" / "offsite" / "model_owner" / "calibration.txt"
_ROWS = 64
_TINY = "import sys; from pathlib import Path; from tiny import tiny_base; tiny_base(Path(sys.argv[1]), blocks=14)"


@dataclass(frozen=True)
class Measured:
    """The peak memory (bytes) and the seconds of one command, both as measured and as its plan predicted."""

    case: str
    peak: int
    planned_peak: int | None
    seconds: float
    planned_seconds: float | None  # of the run, beside loading, validating and writing

    @property
    def ratio(self) -> float | None:
        """The predicted peak divided by the measured one; None if the plan predicts none."""
        return self.planned_peak / self.peak if self.planned_peak else None


def main() -> None:
    """Measure every command, print a line for each, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=None, help='base folder, or "tiny"')
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--images", type=Path, default=None, help="pictures, where the base is an image encoder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--result", type=Path, default=None)
    wanted = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(wanted.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    results = []
    with tempfile.TemporaryDirectory(prefix="offsite-memory-") as scratch:
        for one in _measure(_base(wanted.base, Path(scratch)), Path(scratch), wanted.tokens, wanted.images):
            results.append(one)
            print(_line(one), flush=True)
    if wanted.result or wanted.base is None:
        _write(wanted.result or RESULT, results, wanted)


def _base(wanted: str | None, scratch: Path) -> Path:
    """The base folder to measure with: `wanted`, or for "tiny" a random one, or for None that of the demo."""
    if wanted == "tiny":
        command = [sys.executable, "-c", _TINY, str(scratch / "base")]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(_ROOT / "tests")})
        return scratch / "base"
    if wanted:
        return Path(wanted)
    import platformdirs

    return platformdirs.user_cache_path("offsite") / "SmolLM2-135M-Instruct" / "base"


def _measure(base: Path, scratch: Path, tokens: int, images: Path | None) -> Iterator[Measured]:
    """Pack, tune and plug in, one command after the other; yields the measurement of each."""
    acme, hospital = scratch / "acme", scratch / "hospital"
    for home, name in ((acme, "acme"), (hospital, "hospital")):
        _offsite("keygen", "--name", name, "--out", scratch / f"{name}.pub", "--home", home)
    for home, name in ((acme, "hospital"), (hospital, "acme")):
        _offsite("trust", "add", name, scratch / f"{name}.pub", "--home", home)
    data, settings = images or scratch / "rows.jsonl", scratch / "settings.toml"
    split: list[object] = ["--bottom", 2, "--top", 2]
    if images is None:
        _rows(data, tokens)
        context = min(tokens, json.loads((base / "config.json").read_text())["max_position_embeddings"])
        settings.write_text(f'[tune]\nmax_length = {context}\nlong_rows = "truncate"\nmax_steps = 2\n')
    else:
        settings.write_text("[tune]\nmax_steps = 2\n")
        split = ["--bottom", 0, "--keep", 4, "--top", 4, "--calibration", images]
    print(f"{'command':34}{'peak':>12}{'of the plan':>12}{'plan/peak':>11}{'seconds':>9}{'of the plan':>12}")
    bundle = scratch / "bundle"
    for kind in (["--keep", 8, "--heal", "none"], ["--keep", 8], []) if images is None else (["--heal", "none"], []):
        out = scratch / f"dropped-{len(kind)}" if kind else bundle
        words = ["pack", base, "--out", out, "--for", "hospital", "--home", acme, *kind, *split]
        yield _case(" ".join(map(str, ["pack", *kind])), words)
    for method in ("lora", "full"):
        out = scratch / method
        words = ["tune", bundle, "--data", data, "--out", out, "--home", hospital, "--method", method]
        yield _case(f"tune --method {method}", [*words, "--config", settings])
    if images is not None:  # plugging in moves the same tensors
        return
    for method, form in (("lora", "adapter"), ("lora", "merged"), ("full", "merged")):
        out = scratch / f"{method}-{form}"
        words = ["plug-in", base, scratch / method, "--out", out, "--as", form, "--again", "--home", acme]
        yield _case(f"plug-in --as {form} of {method}", words)


def _case(case: str, words: Sequence[object]) -> Measured:
    """Run a command with --plan and then without, and compare both; `case` is its name in the table."""
    measure = [] if words[0] == "plug-in" else ["measure"]
    plan: dict[str, Any] = json.loads(_offsite(*words, "--plan", *measure, "--json"))
    found = plan["measured"] or {}
    began = time.perf_counter()
    peak = _peak(words)
    seconds = round(time.perf_counter() - began, 1)
    return Measured(case, peak, found.get("peak_bytes"), seconds, found.get("run_seconds"))


def _peak(words: Sequence[object]) -> int:
    """Run an `offsite` command; returns its peak resident memory in bytes, as the system reports it for its process."""
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(_command(*words), stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{words}: exit code {child.returncode}\n{said.read()}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _offsite(*words: object) -> str:
    """Run an `offsite` command; returns its standard output."""
    return subprocess.run(_command(*words), check=True, text=True, capture_output=True).stdout


def _command(*words: object) -> list[str]:
    """The command line for an `offsite` command."""
    return [sys.executable, "-m", "offsite", *map(str, words)]


def _rows(file: Path, tokens: int) -> None:
    """Write rows of ordinary text to a file, each a little longer than `tokens`, the longest that will train."""
    text = _TEXT.read_text(encoding="utf-8")
    length = 8 * tokens  # characters: more tokens than wanted, the rest is cut
    starts = [i * (len(text) - length) // _ROWS for i in range(_ROWS)]
    rows = [{"prompt": text[at : at + 40], "completion": text[at + 40 : at + length]} for at in starts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _line(one: Measured) -> str:
    """Format a measurement as a line of the printed table."""
    planned = f"{one.planned_peak / 2**20:>8,.0f} MiB{one.ratio:>11.2f}" if one.planned_peak else f"{'':>23}"
    seconds = f"{one.planned_seconds:>12.1f}" if one.planned_seconds is not None else ""
    return f"{one.case:34}{one.peak / 2**20:>8,.0f} MiB{planned}{one.seconds:>9.1f}{seconds}"


def _write(file: Path, results: Sequence[Measured], wanted: argparse.Namespace) -> None:
    """Write the measurements to a JSON file, with the machine, the library versions and the settings."""
    names = ("offsite-tuning", "torch", "transformers", "numpy", "peft")
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    content = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {
            "system": platform.platform(),
            "libc": " ".join(platform.libc_ver()),
            "processor": cpu.partition(": ")[2] or platform.processor(),
            "cores": os.cpu_count(),
        },
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names},
        "settings": {
            "threads": wanted.threads,
            "base": wanted.base or "SmolLM2-135M-Instruct",
            "tokens_of_a_row": None if wanted.images else wanted.tokens,
            "pictures": wanted.images and sum(1 for _ in wanted.images.rglob("*.*")),
        },
        "cases": [{**asdict(one), "ratio": one.ratio and round(one.ratio, 3)} for one in results],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
