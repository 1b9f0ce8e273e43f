"""Measures what each choice in `pack --heal refit` changes: ridge, calibration tokens, projections and their order.

    python -m benchmarks.refit --data-root ../shared/data           every case that is not in the result file yet
    python -m benchmarks.refit --cases refit "plain drop"           only these cases
    python -m benchmarks.refit --seeds 0 1 2                        each case is tuned with each of these seeds

The model is SmolLM2-135M-Instruct with 2 + 8 + 2 of its 30 blocks, or 2 + 26 + 2 with half of each matrix pruned by
SparseGPT, calibrated on the package's own text. Each case is packed; scored on WikiText-2, by its loss and by the error
of the hidden states after the emulator relative to the base's; tuned on WebQuestions; and plugged in. An interrupted
run continues, and seeds that are missing are run; to measure a case again, remove it from the result file.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import platformdirs
from benchmarks.work import ROOT, machine, versions

RESULT = Path(__file__).parent / "results" / "refit.json"
TOKENS = 8192  # of calibration where a case does not say otherwise; the default of pack is 65,536
HELD_OUT = 4096  # tokens of WikiText-2's test part that the emulators are judged on
STEPS, TEST_ROWS = 40, 150
ONE_RIDGE = (0.1,)

EIGHT: Mapping[str, Any] = {"bottom": 2, "keep": 8, "top": 2, "calibration_tokens": TOKENS}
HALF: Mapping[str, Any] = {"bottom": 2, "top": 2, "calibration_tokens": TOKENS}
# name -> settings of pack
CASES: Mapping[str, Mapping[str, Any]] = {
    "plain drop": {**EIGHT, "heal": "none"},
    "refit, one fixed ridge": EIGHT,
    "refit": EIGHT,
    "refit, a quarter of the tokens": {**EIGHT, "calibration_tokens": TOKENS // 4},
    "refit, twice the tokens": {**EIGHT, "calibration_tokens": 2 * TOKENS},
    "refit, attention,mlp": {**EIGHT, "refit_maps": "attention,mlp"},
    "refit, mlp,attention": {**EIGHT, "refit_maps": "mlp,attention"},
    "refit, attention,mlp twice": {**EIGHT, "refit_maps": "attention,mlp,attention,mlp"},
    "half pruned, no refit": {**HALF, "heal": "none"},
    "half pruned, refit": HALF,
    "half pruned, refit, attention,mlp": {**HALF, "refit_maps": "attention,mlp"},
}


def main() -> None:
    """Measure the cases and seeds that are not in the result file yet, and print all as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cached = platformdirs.user_cache_path("offsite", appauthor=False) / "SmolLM2-135M-Instruct" / "base"
    parser.add_argument("--base", type=Path, default=cached, help="base folder; `make demo` leaves one in the cache")
    parser.add_argument("--data-root", type=lambda path: Path(path).resolve(), default=ROOT.parent / "shared" / "data")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the tuning")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--result", type=Path, default=RESULT)
    wanted = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(wanted.threads), "HF_HUB_OFFLINE": "1"}
    result = json.loads(wanted.result.read_text()) if wanted.result.exists() else {"cases": {}}
    result |= {"machine": machine(wanted.threads), "versions": versions()}
    missing = {
        name: [seed for seed in wanted.seeds if str(seed) not in result["cases"].get(name, {}).get("plug_in", {})]
        for name in wanted.cases
    }
    if any(missing.values()):
        judge = Judge(wanted.base, wanted.data_root)
        result["base"] = judge.base()
        for name in (name for name, seeds in missing.items() if seeds):
            with tempfile.TemporaryDirectory(prefix="offsite-refit-") as scratch:
                found, before = judge.measure(name, missing[name], Path(scratch)), result["cases"].get(name, {})
            tuned = {row: before.get(row, {}) | found[row] for row in ("emulator", "plug_in")}
            result["cases"][name] = found | before | tuned
            wanted.result.parent.mkdir(exist_ok=True)
            wanted.result.write_text(json.dumps(result, indent=1) + "\n")
            print(name, result["cases"][name], flush=True)
    print(table(result))


class Judge:
    """Scores bundles of one base on WikiText-2 and on a task (WebQuestions), neither of which is used for healing."""

    def __init__(self, base: Path, root: Path) -> None:
        from offsite import Base
        from offsite.model_owner.base_model import open_base
        from offsite.model_owner.calibration.calibration_batches import calibration_batches

        self._folder, self._tasks = base, root / "webquestions"
        model = open_base(Base(base))
        self._text = calibration_batches(model, root / "wikitext2" / "wiki.test.txt", HELD_OUT)
        self._target, self._loss = self._run(base, model.blocks - 2)

    def base(self) -> dict[str, float]:
        """The base's losses: on WikiText-2 in nats per token, and zero-shot on the task in nats per labelled token."""
        return {"text_loss": self._loss, "zero_shot": self._scored(self._folder)}

    def measure(self, name: str, seeds: Sequence[int], scratch: Path) -> dict[str, Any]:
        """Pack a case and score its bundle; then tune and plug in with each seed, and score these models.

        Args:
            name: the name of the case, a key of `CASES`.
            seeds: the seeds of the tuning.
            scratch: a folder for all artifacts.

        Returns:
            The case's record for the result file.
        """
        from offsite import Base, Home, PackSpec, PlugInSpec, TuneSpec, intake, pack, plug_in, tune
        from offsite.model_owner.heal import ridge

        owner, tuner = Home(scratch / "owner"), Home(scratch / "tuner")
        owner.create_identity("owner")
        owner.trust("tuner", tuner.create_identity("tuner").public_key)
        tuner.trust("owner", owner.identity().public_key)
        ridges = ONE_RIDGE if "one fixed ridge" in name else ridge.RIDGES
        started = time.monotonic()
        with mock.patch.object(ridge, "RIDGES", ridges):
            bundle = pack(Base(self._folder), scratch / "bundle", "tuner", PackSpec.model_validate(CASES[name]), owner)
        seconds = time.monotonic() - started
        split = bundle.manifest.split
        found, loss = self._run(bundle.folder, split.bottom + split.emulator)
        tuned: dict[str, dict[str, float]] = {"emulator": {}, "plug_in": {}}
        for seed in seeds:
            returned, plugged = scratch / f"return-{seed}", scratch / f"plugged-{seed}"
            spec = TuneSpec(max_steps=STEPS, seed=seed)
            tune(bundle, self._tasks / "train.jsonl", returned, spec, tuner)
            plug_in(Base(self._folder), intake(returned, owner), plugged, PlugInSpec(), owner)
            tuned["emulator"][str(seed)] = self._scored(bundle.folder, returned)
            tuned["plug_in"][str(seed)] = self._scored(self._folder, plugged)
        return {
            "settings": dict(CASES[name]),
            "ridges": list(ridges),
            "hidden_error": _relative_error(found, self._target),
            "text_loss": loss,
            "emulator_zero_shot": self._scored(bundle.folder),
            **tuned,
            "pack_seconds": round(seconds, 1),
        }

    def _scored(self, model: Path, adapter: Path | None = None) -> float:
        """The loss of a model, or of a model with an adapter, on the task's test rows in nats per labelled token."""
        from offsite import EvalSpec, evaluate

        return evaluate(model, self._tasks / "test.jsonl", EvalSpec(max_rows=TEST_ROWS), adapter=adapter).loss

    def _run(self, folder: Path, blocks: int) -> tuple[Any, float]:
        """Run a model on WikiText-2.

        Returns:
            The hidden states after its first `blocks` blocks, (tokens, H); and the loss in nats per token, without the
            first token of each sequence.
        """
        import torch

        from offsite.models.loading import load_model

        model, seen, nats = load_model(folder, dtype=torch.float32, device=torch.device("cpu")), [], []
        model.model.layers[blocks - 1].register_forward_hook(
            lambda _, __, output: seen.append((output[0] if isinstance(output, tuple) else output).flatten(0, 1))
        )
        with torch.no_grad():
            for batch in self._text:
                for ids in batch.split(1):  # (1, T): the logits of one sequence at once
                    logits = model(ids, use_cache=False).logits[0, :-1]
                    nats.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
        return torch.cat(seen), float(torch.stack(nats).mean())


def _relative_error(found: Any, target: Any) -> float:
    """The relative error of hidden states (tokens, H), as the root of squared errors over squared targets.

    In both sums each token is weighted by 1 / norm of its target, as in refit.
    """
    weights = 1 / target.norm(dim=1, keepdim=True)
    return float(((weights * (found - target).square()).sum() / (weights * target.square()).sum()).sqrt())


def table(result: Mapping[str, Any]) -> str:
    """Format the result as a Markdown table, one row for each case."""
    lines = [
        "| case | hidden error | WikiText-2 loss | task: emulator zero-shot | emulator tuned | plug-in | pack, s |",
        "|---|" + "---|" * 6,
    ]
    if "base" in result:
        base = result["base"]
        lines.append(f"| base, not tuned | 0 | {base['text_loss']:.3f} | | | {base['zero_shot']:.3f} | |")
    for name in CASES:
        if row := result["cases"].get(name):
            losses = f"{row['text_loss']:.3f} | {row['emulator_zero_shot']:.3f}"
            tuned = " | ".join(_spread(row[key]) for key in ("emulator", "plug_in"))
            lines.append(f"| {name} | {row['hidden_error']:.3f} | {losses} | {tuned} | {row['pack_seconds']:.0f} |")
    return "\n".join(lines)


def _spread(by_seed: Mapping[str, float]) -> str:
    """The mean over seeds as text, followed by the value of each seed if there are several."""
    values = [f"{by_seed[seed]:.2f}" for seed in sorted(by_seed, key=int)]
    return f"{statistics.fmean(by_seed.values()):.3f}" + (f" ({', '.join(values)})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
