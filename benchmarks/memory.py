"""Peak memory of packing and tuning, as the operating system counts it, against what `--plan measure` measures.

    python -m benchmarks.memory                 the model of the demo, from the user's cache
    python -m benchmarks.memory --base FOLDER   any base folder; "tiny" makes a tiny random one
    python -m benchmarks.memory --base FOLDER --images FOLDER   an image encoder, and pictures by class

Each command runs in a process of its own, one at a time; its peak is the ru_maxrss that the system reports when it
ends. Nothing heavy is imported here: a child's peak counts what its parent held at the fork. The plan of a stage that
runs no network measures nothing, and its line has the system's count alone.
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
    """One command: its peak in bytes and its seconds, as they were and as the plan measured them."""

    case: str
    peak: int
    planned_peak: int | None
    seconds: float
    planned_seconds: float | None  # of the run, beside loading, validating and writing

    @property
    def ratio(self) -> float | None:
        """The plan's peak over the command's."""
        return self.planned_peak / self.peak if self.planned_peak else None


def main() -> None:
    """Measure, print the table, and write the result."""
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
    if wanted == "tiny":
        command = [sys.executable, "-c", _TINY, str(scratch / "base")]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(_ROOT / "tests")})
        return scratch / "base"
    if wanted:
        return Path(wanted)
    import platformdirs

    return platformdirs.user_cache_path("offsite") / "SmolLM2-135M-Instruct" / "base"


def _measure(base: Path, scratch: Path, tokens: int, images: Path | None) -> Iterator[Measured]:
    """Play both parties, one command after the other."""
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
    measure = [] if words[0] == "plug-in" else ["measure"]
    plan: dict[str, Any] = json.loads(_offsite(*words, "--plan", *measure, "--json"))
    found = plan["measured"] or {}
    began = time.perf_counter()
    peak = _peak(words)
    seconds = round(time.perf_counter() - began, 1)
    return Measured(case, peak, found.get("peak_bytes"), seconds, found.get("run_seconds"))


def _peak(words: Sequence[object]) -> int:
    """Peak resident memory in bytes of one command, as the system counts it for that process alone."""
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(_command(*words), stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{words}: exit code {child.returncode}\n{said.read()}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _offsite(*words: object) -> str:
    return subprocess.run(_command(*words), check=True, text=True, capture_output=True).stdout


def _command(*words: object) -> list[str]:
    return [sys.executable, "-m", "offsite", *map(str, words)]


def _rows(file: Path, tokens: int) -> None:
    """Rows of ordinary text, each a little longer than the longest that the settings permit."""
    text = _TEXT.read_text(encoding="utf-8")
    length = 8 * tokens  # characters: more tokens than wanted, the rest is cut
    starts = [i * (len(text) - length) // _ROWS for i in range(_ROWS)]
    rows = [{"prompt": text[at : at + 40], "completion": text[at + 40 : at + length]} for at in starts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _line(one: Measured) -> str:
    planned = f"{one.planned_peak / 2**20:>8,.0f} MiB{one.ratio:>11.2f}" if one.planned_peak else f"{'':>23}"
    seconds = f"{one.planned_seconds:>12.1f}" if one.planned_seconds is not None else ""
    return f"{one.case:34}{one.peak / 2**20:>8,.0f} MiB{planned}{one.seconds:>9.1f}{seconds}"


def _write(file: Path, results: Sequence[Measured], wanted: argparse.Namespace) -> None:
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
