"""The work folder of the benchmarks: bases, bundles, rows and all finished measurements, so that a run can continue.

A measurement is used again only if code, settings, library versions, threads and CPU are still the same.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import SHAPES, Cell

ROOT = Path(__file__).parent.parent
OFFSITE = (sys.executable, "-c", "import sys; from offsite.cli import main; sys.exit(main())")
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")
_CLOCK = "%Y-%m-%dT%H:%M:%S"
_SAME_RUN = 2.0  # hours; what was measured longer ago is not held against what is measured now
_JUST_NOW = 1.0  # seconds; products measured behind one run stand for those before the next
_PEAK = """
import sys, time, torch

torch.set_num_threads(int(sys.argv[1]))


def fastest(size, dtype):
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


dtypes = [torch.float32] if sys.argv[2] == "fp32" else [torch.bfloat16, torch.float32]
dtype = max(dtypes, key=lambda one: fastest(512, one))
print(max(fastest(size, dtype) for size in (2048, 3072, 4096)))
"""


class ChildError(Exception):
    """The process of a measurement failed; `no_memory` says whether it ran out of memory."""

    def __init__(self, command: Sequence[str], code: int, said: str) -> None:
        self.no_memory = code == -signal.SIGKILL or "can't allocate memory" in said
        super().__init__(f"{' '.join(command)[:400]} ended with {code}:\n{said[-3000:]}")


def _hours_since(at: str) -> float:
    """The hours since a time in the format `_CLOCK`."""
    return (time.time() - time.mktime(time.strptime(at, _CLOCK))) / 3600


class Work:
    """The work folder of the benchmarks, with everything that was made and measured so far.

    Args:
        folder: the folder, created if it does not exist.
        threads: the number of CPU threads in all measurements.
        fp32: whether all contestants compute in fp32, even if bf16 is faster on this CPU.
    """

    def __init__(self, folder: Path, threads: int, *, fp32: bool = False) -> None:
        self.folder, self.threads = folder.resolve(), threads
        self.fp32 = fp32  # everybody, whatever the processor multiplies fast
        self._found_products, self._products_at = 0.0, -math.inf
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = self.folder / "measurements.jsonl"
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self._records: dict[str, dict[str, Any]] = {
            record["key"]: record for record in map(json.loads, lines) if _hours_since(record["at"]) < _SAME_RUN
        }

    def once(self, key: str, of: object, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the saved measurement if it is under two hours old with the same conditions, else make a new one.

        Args:
            key: the name of the measurement.
            of: the conditions, as values that JSON can hold, in addition to threads, library versions and CPU.
            measure: makes the measurement, as values that JSON can hold.
        """
        key = f"fp32/{key}" if self.fp32 else key
        stamp = digest([of, self.threads, versions(), processor()])
        found = self._records.get(key)
        if found is None or found["of"] != stamp:
            found = {"key": key, "of": stamp, "at": time.strftime(_CLOCK), **measure()}
            self._records[key] = found
            with self._log.open("a") as stream:
                stream.write(json.dumps(found) + "\n")
            print(key, {name: value for name, value in found.items() if name not in ("key", "of", "at")}, flush=True)
        return found

    def beside_products(self, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Make a measurement, and measure the speed of plain matrix products just before and just after it.

        On some machines this speed changes from one minute to the next.

        Returns:
            The measurement, with both speeds under "matmul_flops": operations per second in bf16 or fp32, whichever is
            faster.
        """
        before = self._products()
        return {**measure(), "matmul_flops": [before, self._products()]}

    def _products(self) -> float:
        """The operations per second of plain matrix products; a value from the last second is used again."""
        if time.monotonic() - self._products_at > _JUST_NOW:
            said, _ = run([sys.executable, "-c", _PEAK, str(self.threads), "fp32" if self.fp32 else "any"])
            self._found_products, self._products_at = float(said), time.monotonic()
        return self._found_products

    def source(self, root: Path, data: str) -> Path:
        """The file with the training rows of a data set; exits if it does not exist.

        Args:
            root: the folder with the data sets.
            data: the name of the data set.
        """
        file = root / data / "train.jsonl"
        if not file.exists():
            sys.exit(
                f"no rows at {file}\nname the folder that holds {data}/train.jsonl with --data-root; "
                'a row is {"prompt": ..., "completion": ...}'
            )
        return file

    def rows(self, cell: Cell, root: Path) -> Path:
        """Write as many rows of a data set as the cell's steps need to a file; returns its path.

        The rows are spread evenly over the data set sorted by length (in characters); or they are the longest ones, if
        the cell says so.
        """
        count = cell.rows * (cell.warmup + cell.steps)
        with self.source(root, cell.data).open(encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        pairs = sorted(
            ({key: row[key] for key in ("prompt", "completion")} for row in found),
            key=lambda row: len(row["prompt"] + row["completion"]),
        )
        if len(pairs) < count:
            sys.exit(f"{cell.data} has {len(pairs)} rows, and {cell.name} takes {count}: use a larger data set")
        chosen = pairs[-count:] if cell.longest else [pairs[int((i + 0.5) * len(pairs) / count)] for i in range(count)]
        random.Random(0).shuffle(chosen)
        target = self.folder / f"{cell.shape.split(',')[0]}-{cell.data}.jsonl"
        target.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        return target

    def base(self, shape: str) -> Path:
        """The base folder of a shape: SmolLM2 itself, or random weights in another shape with SmolLM2's tokenizer."""
        from offsite.study.demos.pretrained import cached_smollm2

        def offsite(words: Sequence[str | Path]) -> None:
            run([*OFFSITE, *map(str, words)])

        real = cached_smollm2(lambda: print("downloading SmolLM2-135M-Instruct", flush=True), offsite)[0]
        folder = self.folder / shape.split(",")[0]
        if shape == "smollm2":
            return real
        if not folder.exists():
            run([sys.executable, "-m", "benchmarks.random_base", shape, str(real), str(folder)])
        return folder

    def bundle(self, shape: str) -> Path:
        """The folder of the bundle for a language model's shape, which has the split in `SHAPES`."""
        return self.packed(f"{shape.split(',')[0]}-bundle", self.base(shape), SHAPES[shape])

    def packed(self, name: str, base: Path, split: tuple[int, int, int]) -> Path:
        """The folder of a bundle; it is packed again if the package's code has changed.

        The emulator is not healed, since this does not change the speed.

        Args:
            name: the start of the folder's name.
            base: the base folder.
            split: the numbers of bottom, emulator and top blocks.
        """
        from offsite import Base, Home, PackSpec, pack

        folder = self.folder / f"{name}-{code_digest()[:12]}"
        if not folder.exists():
            for old in self.folder.glob(f"{name}-*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()  # the log next to it
            owner, tuner = Home(self.folder / "owner"), Home(self.folder / "tuner")
            if not owner.folder.exists():
                owner.create_identity("owner")
                owner.trust("tuner", tuner.create_identity("tuner").public_key)
                tuner.trust("owner", owner.identity().public_key)
            bottom, keep, top = split
            spec = PackSpec(bottom=bottom, keep=keep, top=top, heal="none")  # type: ignore[arg-type]
            pack(Base(base), folder, "tuner", spec, owner)
        return folder

    @property
    def home(self) -> Path:
        """The home of the data owner."""
        return self.folder / "tuner"


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Run a command in a process of its own.

    Args:
        command: the words of the command.
        environment: variables in addition to those of this process.

    Returns:
        Its standard output, and its peak resident memory in bytes, as the system reports it for that process alone.

    Raises:
        ChildError: the command failed.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    _end_first(process.pid)
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
        raise ChildError(command, process.returncode, errors[0])
    return output, used.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _end_first(pid: int) -> None:
    """Make the system kill this child, and no other process, if memory runs out."""
    file = Path(f"/proc/{pid}/oom_score_adj")
    if file.exists():
        file.write_text("1000")


def last_line(output: str) -> Any:
    """The JSON value in the last line of a command's output."""
    return json.loads(output.splitlines()[-1])


def digest(of: object) -> str:
    """The SHA-256 digest, in hex, of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()


def code_digest() -> str:
    """The SHA-256 digest, in hex, of the package's source files and of the result of `compiled`."""
    found = hashlib.sha256(str(compiled()).encode())
    for file in sorted(file for kind in ("*.py", "*.c") for file in (ROOT / "src" / "offsite").rglob(kind)):
        found.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return found.hexdigest()


def compiled() -> bool:
    """Whether compiled kernels were built, and OFFSITE_KERNELS=0 does not switch them off."""
    folder = ROOT / "src" / "offsite" / "kernels" / "cpu"
    return any(folder.glob("_kernels.*so")) and os.environ.get("OFFSITE_KERNELS") != "0"


def versions() -> dict[str, str]:
    """The versions of the libraries that the speed depends on, by name."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def commit() -> str:
    """The hash of the checked-out commit, with " with changes" after it if files of the code differ from it."""
    said = [
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "src", "benchmarks/*.py"])
    ]
    return said[0] + (" with changes" if said[1] else "")


def processor() -> dict[str, Any]:
    """The name of the CPU, and those of its instruction sets that decide how fast bf16 is."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return {
        "processor": model or platform.processor(),
        "instructions": sorted(set(flags) & {"amx_bf16", "avx512_bf16", "avx512f", "avx2"}),
    }


def machine(threads: int, *, fp32: bool = False) -> dict[str, Any]:
    """Describe the machine of a measurement for a result file: CPU, threads, kernels, memory and Python."""
    return {
        **processor(),
        **({"arithmetic": "everybody in fp32"} if fp32 else {}),
        "threads": threads,
        "kernels": compiled(),
        "settings": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")},
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
    }
