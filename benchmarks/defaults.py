"""Measures what the defaults of `pack` and `tune` are based on: how each choice changes the plug-in's loss.

    python -m benchmarks.defaults                 every case that is not in the result file yet
    python -m benchmarks.defaults --only refit    cases whose name contains this

The task is to write docstrings for the functions of the installed torch package, made by the demo's own code. Neither
the demo's data nor the calibration text contains these functions. Every case runs the public functions of both parties
in one process, each with its own home. The case "defaults" changes no setting; the others have 2 + 8 + 2 blocks and
the settings in their name. An interrupted run continues; to measure a case again, remove it from the result file.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs

RESULT = Path(__file__).parent / "results" / "defaults.json"
STEPS = 60
TRAIN_ROWS, TEST_ROWS = 1200, 120

EIGHT: Mapping[str, Any] = {"bottom": 2, "keep": 8, "top": 2}  # of 30 blocks: what most choices were compared on
# name -> settings of pack and of tune over the defaults
CASES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "defaults": ({}, {}),
    "keep 8": (EIGHT, {}),
    "plain drop": ({**EIGHT, "heal": "none"}, {}),
    "half the calibration tokens": ({**EIGHT, "calibration_tokens": 32_768}, {}),
    "select influence": ({**EIGHT, "select": "influence"}, {}),
    "lr 5e-4": (EIGHT, {"lr": 5e-4}),
    "lr 2e-3": (EIGHT, {"lr": 2e-3}),
    "twice the steps": (EIGHT, {"max_steps": 2 * STEPS}),
    "full, lr 1e-4": (EIGHT, {"method": "full", "lr": 1e-4}),
    "full, lr 3e-4": (EIGHT, {"method": "full", "lr": 3e-4}),
    "keep 14": ({**EIGHT, "keep": 14}, {}),
}


def main() -> None:
    """Measure the cases that are not in the result file yet, and print all as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cached = platformdirs.user_cache_path("offsite", appauthor=False) / "SmolLM2-135M-Instruct" / "base"
    parser.add_argument("--base", type=Path, default=cached, help="base folder; `make demo` leaves one in the cache")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--result", type=Path, default=RESULT)
    wanted = parser.parse_args()
    results = json.loads(wanted.result.read_text()) if wanted.result.exists() else {}
    for name in CASES:
        if wanted.only in name and name not in results:
            with tempfile.TemporaryDirectory(prefix="offsite-defaults-") as scratch:
                results[name] = _measure(wanted.base, Path(scratch), *CASES[name])
            wanted.result.parent.mkdir(exist_ok=True)
            wanted.result.write_text(json.dumps(results, indent=1) + "\n")
            print(name, results[name], flush=True)
    print(_table(results))


def _measure(base: Path, scratch: Path, packing: Mapping[str, Any], tuning: Mapping[str, Any]) -> dict[str, float]:
    """Pack, tune and plug in with these settings of `pack` and `tune`.

    Returns:
        The losses of the base, the emulator, the tuned emulator and the plug-in, and the seconds to pack and to tune.
    """
    from offsite import Base, EvalSpec, Home, PackSpec, PlugInSpec, TuneSpec, evaluate, intake, pack, plug_in, tune
    from offsite.study.demos.docstring_task import make_task, write_task

    owner, hospital = Home(scratch / "owner"), Home(scratch / "hospital")
    owner.create_identity("owner")
    owner.trust("hospital", hospital.create_identity("hospital").public_key)
    hospital.trust("owner", owner.identity().public_key)
    torch_folder = Path(str(importlib.util.find_spec("torch").origin)).parent  # type: ignore[union-attr]
    train, test = scratch / "train.jsonl", scratch / "test.jsonl"
    write_task(make_task(torch_folder, TRAIN_ROWS, TEST_ROWS), train, test)
    started = time.monotonic()
    bundle = pack(Base(base), scratch / "bundle", "hospital", PackSpec(**packing), owner)
    packed = time.monotonic()
    spec = TuneSpec(**{"max_steps": STEPS, "long_rows": "skip", "max_length": 512, **tuning})
    tune(bundle, train, scratch / "return", spec, hospital)
    tuned = time.monotonic()
    plugged = plug_in(Base(base), intake(scratch / "return", owner), scratch / "plugged", PlugInSpec(), owner)
    rows = EvalSpec(long_rows="skip", max_length=512)
    on_base = plugged.manifest.form == "adapter"
    return {
        "zero_shot": evaluate(base, test, rows).loss,
        "emulator_zero_shot": evaluate(bundle.folder, test, rows).loss,
        "emulator": evaluate(bundle.folder, test, rows, adapter=scratch / "return").loss,
        "plug_in": evaluate(
            base if on_base else plugged.folder, test, rows, adapter=plugged.folder if on_base else None
        ).loss,
        "pack_seconds": round(packed - started, 1),
        "tune_seconds": round(tuned - packed, 1),
    }


def _table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Format the results as a Markdown table, one row for each case."""
    lines = ["| case | zero-shot | emulator zero-shot | emulator | plug-in | pack, s | tune, s |", "|---|" + "---|" * 6]
    for name, row in results.items():
        losses = " | ".join(f"{row[key]:.3f}" for key in ("zero_shot", "emulator_zero_shot", "emulator", "plug_in"))
        lines.append(f"| {name} | {losses} | {row['pack_seconds']:.0f} | {row['tune_seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
