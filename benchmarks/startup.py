"""Measures the CPU time of the commands that run no model (help, verify, inspect), and whether they import torch.

    python -m benchmarks.startup

Targets: `offsite --help` under 0.3 s, `offsite verify` of a small bundle under 0.5 s. The imports of each stage, which
its command does only when the work starts, are measured too. Modules are compiled to bytecode before the measurement,
as after an installation.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.work import OFFSITE, ROOT, commit, machine, run

RESULT = Path(__file__).parent / "results" / "startup.json"
VERBS = (
    "import", "pack", "plug-in", "tune", "verify", "inspect", "eval", "compare", "keygen", "trust", "audit", "demo",
    "study", "models", "init", "chat", "generate", "doctor",
)  # fmt: skip
STAGES: Mapping[str, str] = {
    "import": "offsite.model_owner.importing.import_model",
    "pack": "offsite.model_owner.pack",
    "plug-in": "offsite.model_owner.plugging_in.plug_in",
    "tune": "offsite.data_owner.tune",
    "eval": "offsite.evaluation.evaluate",
    "verify": "offsite.protocol.verify",
}
_TINY = "import sys; from pathlib import Path; from tiny import tiny_base; tiny_base(Path(sys.argv[1]), blocks=6)"
_TORCH = "import sys; print('torch' in sys.modules)"
_CALL = (
    "import contextlib, io, sys; from offsite.cli import main\nwith contextlib.redirect_stdout(io.StringIO()): main()"
)


def main() -> None:
    """Measure every command, write the result and print it as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--result", type=Path, default=RESULT)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="offsite-startup-") as scratch:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(scratch) / "compiled")
        bundle, home = _bundle(Path(scratch))
        commands: dict[str, Sequence[str]] = {"--help": ["--help"]} | {
            f"{verb} --help": [verb, "--help"] for verb in VERBS
        }
        commands |= {f"{verb} BUNDLE": [verb, str(bundle), "--home", str(home)] for verb in ("verify", "inspect")}
        records = [
            {
                "command": f"offsite {name}",
                **_seconds([*OFFSITE, *words], wanted.repetitions),
                "loads_torch": _loads_torch([sys.executable, "-c", f"{_CALL}\n{_TORCH}", *words]),
            }
            for name, words in commands.items()
        ]
        records += [
            {
                "command": f"imports of {verb}",
                **_seconds([sys.executable, "-c", f"import {module}"], wanted.repetitions),
                "loads_torch": _loads_torch([sys.executable, "-c", f"import {module}\n{_TORCH}"]),
            }
            for verb, module in STAGES.items()
        ]
    result = {"machine": machine(1), "commit": commit(), "repetitions": wanted.repetitions, "records": records}
    wanted.result.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def _bundle(scratch: Path) -> tuple[Path, Path]:
    """Pack a bundle of a tiny base; returns the bundle's folder and the home of its recipient."""
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    run([sys.executable, "-c", _TINY, str(scratch / "base")], {"PYTHONPATH": path})
    from offsite import Base, Home, PackSpec, pack

    owner, tuner = Home(scratch / "owner"), Home(scratch / "tuner")
    owner.create_identity("owner")
    owner.trust("tuner", tuner.create_identity("tuner").public_key)
    tuner.trust("owner", owner.identity().public_key)
    spec = PackSpec(keep=1, heal="none")  # type: ignore[arg-type]
    return pack(Base(scratch / "base"), scratch / "bundle", "tuner", spec, owner).folder, tuner.folder


def _seconds(command: Sequence[str], repetitions: int) -> dict[str, Any]:
    """Run a command several times; returns the median of its CPU time (user and system) in seconds, and the range."""
    run(command)  # compiles what it imports
    found = [_once(command) for _ in range(repetitions)]
    return {
        "processor_s": round(statistics.median(found), 3),
        "spread": [round(min(found), 3), round(max(found), 3)],
    }


def _once(command: Sequence[str]) -> float:
    """Run a command once; returns its CPU time in seconds."""
    quiet = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    process = os.posix_spawn(sys.executable, command, os.environ, file_actions=quiet)
    used = os.wait4(process, 0)[2]
    return used.ru_utime + used.ru_stime


def _loads_torch(command: Sequence[str]) -> bool:
    """Whether torch was imported; the command must print this as its last word."""
    return run(command)[0].split()[-1] == "True"


def table(result: Mapping[str, Any]) -> str:
    """Format the result as a Markdown table, one row for each command."""
    lines = ["| command | CPU time, s (least to most) | loads torch |", "|---|---|---|"]
    for record in result["records"]:
        torch = "yes" if record["loads_torch"] else "no"
        low, high = record["spread"]
        lines.append(f"| `{record['command']}` | {record['processor_s']:.2f} ({low:.2f} to {high:.2f}) | {torch} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
