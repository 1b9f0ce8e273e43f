"""Plays both parties on a tiny random model in a temporary folder: pack, tune, plug in, evaluate."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from offsite.config import EvalSpec, PackSpec, PlugInSpec, TuneSpec
from offsite.data_owner.tune import tune
from offsite.errors import OffsiteError
from offsite.evaluation.evaluate import evaluate
from offsite.kernels.runtime import has_bf16_vectors, has_matrix_tiles
from offsite.model_owner.intake import intake
from offsite.model_owner.pack import pack
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.progress import Event, Progress, silent
from offsite.protocol.home import Home
from offsite.protocol.verify import verify_bundle
from offsite.study.demos.tiny_base import tiny_base
from offsite.study.doctor.finding import Finding
from offsite.training.run_log import last_record, log_file

T = TypeVar("T")

_BLOCKS = 4
_ROWS = 8
_SENTENCES = 300  # of the text to calibrate on; the text that ships takes longer
_STEPS = 2
_REPORT = "report it with the output of `offsite doctor --json`"


def run_self_test(progress: Progress = silent) -> tuple[dict[str, Any], list[Finding]]:
    """Run every step of both parties once, and check that the plug-in differs from the base.

    Args:
        progress: receives an event for each step.

    Returns:
        The seconds of each step, and the report of the kernels; and a problem for the step that failed, if one did.
    """
    seconds: dict[str, float] = {}
    facts: dict[str, Any] = {"seconds": seconds}
    step = "make a temporary folder"

    def timed(name: str, run: Callable[[], T]) -> T:
        nonlocal step
        step = name
        progress(Event(f"self-test: {name}", len(seconds), 6))
        started = time.monotonic()
        result = run()
        seconds[name] = round(time.monotonic() - started, 2)
        return result

    try:
        with tempfile.TemporaryDirectory(prefix="offsite-doctor-") as scratch:
            facts["kernels"] = _chain(Path(scratch), timed)
    except OffsiteError as error:
        what = "; ".join([error.what, *error.reasons])
        return facts, [Finding("problem", f"the self-test failed at {step!r}: {what}", _REPORT, error.exit_code)]
    except (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        what = f"{type(error).__name__}: {error}"  # of a library that does not fit the others
        return facts, [Finding("problem", f"the self-test failed at {step!r}: {what}", _REPORT)]
    return facts, list(_about_kernels(facts["kernels"]))


def _about_kernels(report: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield advice if this CPU could use the compiled kernels, and they were not compiled."""
    pieces = {str(piece["name"]): piece for piece in report.get("pieces", ())}
    compiled = pieces.get("compiled kernels", {"count": 1, "reason": ""})
    if not compiled["count"] and "not compiled" in compiled["reason"] and (has_matrix_tiles() or has_bf16_vectors()):
        yield Finding(
            "advice",
            "the kernels in C were not compiled when the package was installed, and this CPU could use them",
            "install a C compiler, then install the package again",
        )


def _chain(folder: Path, timed: Callable[[str, Callable[[], Any]], Any]) -> dict[str, Any]:
    """Play both parties in a folder; returns the report of the kernels in the tuning.

    Args:
        folder: an empty folder.
        timed: runs a step under a name, and returns its result.

    Raises:
        OffsiteError: a step failed, or the plug-in does not differ from the base.
    """
    owner, tuner = Home(folder / "owner"), Home(folder / "tuner")
    rows = folder / "rows.jsonl"
    lines = [{"prompt": f"What comes after {i}?", "completion": f" {i + 1} comes after {i}."} for i in range(_ROWS)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = folder / "calibration.txt"
    text.write_text("".join(f"The number {i} is followed by {i + 1}.\n" for i in range(_SENTENCES)), encoding="utf-8")

    def parties() -> None:
        owner_key, tuner_key = (home.create_identity(home.folder.name).public_key for home in (owner, tuner))
        owner.trust("tuner", tuner_key, "data-owner")
        tuner.trust("owner", owner_key, "model-owner")

    timed("make keys", parties)
    base = timed("make a tiny model", lambda: tiny_base(folder / "base", "llama", _BLOCKS))
    timed("pack", lambda: pack(base, folder / "bundle", "tuner", PackSpec(calibration=text), owner))
    bundle = timed("verify", lambda: verify_bundle(folder / "bundle", tuner, hold=True))
    spec = TuneSpec(max_steps=_STEPS, batch_size=_ROWS)
    timed("tune", lambda: tune(bundle, rows, folder / "return", spec, tuner))

    def plug_and_score() -> None:
        returned = intake(folder / "return", owner)
        plugged = plug_in(base, returned, folder / "plugged", PlugInSpec(), owner)
        before, after = (evaluate(base, rows, EvalSpec(), adapter=one).loss for one in (None, plugged))
        if not after < before:
            raise OffsiteError(
                f"the plug-in's loss on its own rows is {after:.4f}, and the base's {before:.4f}: expected a lower one",
                next_step=_REPORT,
            )

    timed("plug in", plug_and_score)
    return dict(last_record(log_file(folder / "return"), "kernels") or {})
