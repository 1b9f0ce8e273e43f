"""Processor time of the commands that only read: help, verify and inspect; and whether any of them loads torch.

    python -m benchmarks.startup

Targets: `offsite --help` under 0.3 s, `offsite verify` of a small bundle under 0.5 s.
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.tuning import _CODE, _ROOT, _machine

RESULT = Path(__file__).parent / "results" / "startup.json"
REPETITIONS = 7
VERBS = ("import", "pack", "plug-in", "tune", "verify", "inspect", "eval", "keygen", "demo")
_TINY = "import sys; from pathlib import Path; from tiny import tiny_base; tiny_base(Path(sys.argv[1]), blocks=6)"


def main() -> None:
    """Measure, print the table, write the result."""
    with tempfile.TemporaryDirectory(prefix="offsite-startup-") as scratch:
        bundle, home = _bundle(Path(scratch))
        commands = [["--help"], *([verb, "--help"] for verb in VERBS)]
        commands += [[verb, str(bundle), "--home", str(home)] for verb in ("verify", "inspect")]
        records = [
            {
                "command": " ".join("BUNDLE" if word == str(bundle) else word for word in words if word != str(home)),
                "processor_s": round(statistics.median(_seconds(words) for _ in range(REPETITIONS)), 3),
                "loads_torch": _loads_torch(words),
            }
            for words in commands
        ]
    result = {"machine": _machine(1), "repetitions": REPETITIONS, "records": records}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def _bundle(scratch: Path) -> tuple[Path, Path]:
    import subprocess

    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    subprocess.run(
        [sys.executable, "-c", _TINY, str(scratch / "base")], env=environment, check=True, capture_output=True
    )
    from offsite import Base, Home, PackSpec, pack

    owner, tuner = Home(scratch / "owner"), Home(scratch / "tuner")
    owner.create_identity("owner")
    owner.trust("tuner", tuner.create_identity("tuner").public_key)
    tuner.trust("owner", owner.identity().public_key)
    bundle = pack(Base(scratch / "base"), scratch / "bundle", "tuner", PackSpec(keep=1, heal="none"), owner)
    return bundle.folder, tuner.folder


def _seconds(words: list[str]) -> float:
    """User and system time of one command."""
    process = os.posix_spawn(
        sys.executable,
        [sys.executable, *_CODE, *words],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, used = os.wait4(process, 0)
    if status:
        sys.exit(f"offsite {' '.join(words)} failed")
    return used.ru_utime + used.ru_stime


def _loads_torch(words: list[str]) -> bool:
    code = (
        "import sys\nfrom offsite.cli import main\nimport contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    main()\n"
        "sys.exit(7 if 'torch' in sys.modules else 0)"
    )
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code, *words], os.environ)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| command | processor time, s | loads torch |", "|---|---|---|"]
    for record in result["records"]:
        torch = "yes" if record["loads_torch"] else "no"
        lines.append(f"| `offsite {record['command']}` | {record['processor_s']:.2f} | {torch} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
