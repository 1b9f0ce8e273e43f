"""The language demo: both parties run the whole protocol on one machine, each with its own home and folder.

The demo runs the commands of the two parties in separate processes, and copies folders instead of sending them. Two
things are no command of a party: making the task's data, and scoring the models for the result table.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from offsite.progress import Progress, silent
from offsite.storage.files import replace_file
from offsite.study.demos.docstring_task import make_task, standard_library, write_task
from offsite.study.demos.gains import Gains, gains_over_zero_shot
from offsite.study.demos.pretrained import cached_smollm2
from offsite.study.resumable_chain import OWNER, TUNER, Chain, require_demo_folder
from offsite.study.run_command import Words, settings_toml

ROWS = ("zero-shot", "emulator zero-shot", "full fine-tuning", "adapter on base", "emulator", "plug-in")
_SHOWN = ("loss", "perplexity", "tokens", "rows", "skipped")
_SAMPLES = 3
CALIBRATION_TOKENS = 32_768  # half of the default, for a demo of a few minutes
ScoredModels = dict[str, tuple[Path, Path | None]]  # by name: the folder of a model, and of an adapter for it


@dataclass(frozen=True)
class Demo:
    """The results of a demo: a row for each scored model, seconds of each step, bytes of each artifact, an example."""

    rows: tuple[Mapping[str, Any], ...]
    gains: Gains  # in nats per token
    base_parameters: Mapping[str, float]  # shares of the base's that were sent: "verbatim", "compressed", "not_sent"
    seconds: Mapping[str, float]
    bytes: Mapping[str, int]
    sample: Mapping[str, str]
    task: Mapping[str, int]
    settings: Mapping[str, Any]


def demo(
    workdir: Path,
    *,
    data: Path | None = None,
    model: Path | None = None,
    steps: int | None = None,
    full: bool = False,
    progress: Progress = silent,
) -> Demo:
    """Run the protocol, or the remaining steps after an interruption, and score every model of the result table.

    Args:
        workdir: the folder of both parties; steps whose inputs are unchanged since an earlier run are not repeated.
        data: the data owner's Python code; None means the interpreter's standard library.
        model: a base folder or GGUF file; None means SmolLM2-135M-Instruct from its wheel.
        steps: optimiser steps of every tuning; None leaves the command's default.
        full: also tune the uncompressed model twice: once the adapter only, once all blocks but one.
        progress: one event for each step, before it runs.

    Raises:
        OffsiteError: a step failed; its message was printed on standard error already.
    """
    chain = Chain(require_demo_folder(workdir), progress, _step_count(full), basis=code_digest())
    base = _obtain(chain, model)
    introduce(chain)
    task = _private_data(chain, data)
    _protocol(chain, base, steps)
    scores = _score(chain, base, _models_to_score(chain, base))
    if full:
        scores |= _score(chain, base, _bounds(chain, base, steps))
    rows = tuple({"name": name} | {key: scores[name][key] for key in _SHOWN} for name in ROWS if name in scores)
    sample = _sample(scores["zero-shot"]["samples"], scores["plug-in"]["samples"])
    sizes = {name: chain.results[step]["bytes"] for name, step in _SIZED.items()}
    gains = gains_over_zero_shot({name: score["loss"] for name, score in scores.items()}, "loss")
    sent = chain.results["pack"]["base_parameters"]
    return Demo(rows, gains, sent, dict(chain.seconds), sizes, sample, task, _settings(chain))


_SIZED = {"base": "import", "bundle": "pack", "return": "tune", "plug-in": "plug-in"}


# --- the steps ---------------------------------------------------------------------------------------------------


def _obtain(chain: Chain, model: Path | None) -> Path:
    """Return the base folder: `model`, imported, or SmolLM2-135M-Instruct from the user's cache."""
    if model is None:
        base, seconds, size = cached_smollm2(lambda: chain.announce("download", "get SmolLM2-135M-Instruct"), chain.run)
        chain.note("import", {"source": str(base)}, {"bytes": size}, seconds)
        return base
    base = chain.folder(OWNER, "base")
    stamp = {"source": str(model.resolve()), "changed": newest(model)}
    chain.command("import", "the model's owner imports the base model", ["import", model, "--out", base], base, stamp)
    return base


def introduce(chain: Chain) -> None:
    """Let both parties make their keys, exchange the public ones and trust each other."""
    for party, other in ((OWNER, TUNER), (TUNER, OWNER)):
        public = chain.folder(party, f"{party}.pub")
        chain.step(f"keys of {party}", f"{party} makes its keys", partial(_keygen, chain, party, public), [public], {})
        chain.copy(f"key to {other}", public, chain.folder(other, f"{party}.pub"))
    for party, other in ((OWNER, TUNER), (TUNER, OWNER)):
        verb: Words = ["trust", "add", other, chain.folder(party, f"{other}.pub")]
        chain.command(f"trust of {party}", f"{party} trusts {other}'s key", verb, by=party)


def _keygen(chain: Chain, party: str, public: Path) -> Any:
    """Make a party's key if it has none, and write its public key; with a new key it would be another party."""
    home = chain.folder(party, "home")
    name = [] if (home / "key.pem").exists() else ["--name", party]
    return chain.run(["--home", home, "keygen", *name, "--out", public])


def _private_data(chain: Chain, data: Path | None) -> Mapping[str, int]:
    """Make the data owner's training and test rows; returns the numbers of rows and of modules."""
    source = data or standard_library()
    train, test = chain.folder(TUNER, "train.jsonl"), chain.folder(TUNER, "test.jsonl")

    def make() -> dict[str, Any]:
        task = make_task(source)
        write_task(task, train, test)
        return {
            "train_rows": len(task.train),
            "test_rows": len(task.test),
            "train_modules": task.modules(task.train),
            "test_modules": task.modules(task.test),
        }

    stamp = {"source": str(source.resolve()), "python": sys.version}
    counts: Mapping[str, int] = chain.step(
        "data", "the data owner's private task: code to docstring", make, [train, test], stamp
    )
    return counts


def _protocol(chain: Chain, base: Path, steps: int | None) -> None:
    """Run the steps of the protocol, from packing to plugging in."""
    bundle, returned = chain.folder(OWNER, "bundle"), chain.folder(TUNER, "return")
    received, came_back = chain.folder(TUNER, "bundle"), chain.folder(OWNER, "return")
    plugged = chain.folder(OWNER, "plugged")
    pack: Words = ["pack", base, "--out", bundle, "--for", TUNER, "--zeros", "left-out"]
    settings = chain.folder(OWNER, "settings.toml")
    replace_file(settings, settings_toml({"pack": {"calibration_tokens": CALIBRATION_TOKENS}}))
    pack += ["--config", settings]
    chain.command("pack", "the model's owner packs a bundle", pack, bundle, {"base": newest(base)})
    chain.copy("bundle over the wire", bundle, received)
    chain.command("verify bundle", "the data owner verifies the bundle", ["verify", received], by=TUNER)
    _tune(chain, "tune", "the data owner tunes the adapter on the emulator", received, returned, steps)
    chain.copy("return over the wire", returned, came_back)
    chain.command("verify return", "the model's owner verifies the return", ["verify", came_back], by=OWNER)
    plug: Words = ["plug-in", base, came_back, "--out", plugged]
    chain.command("plug-in", "the model's owner plugs the return in", plug, plugged, again="--again")


def _tune(chain: Chain, name: str, description: str, bundle: Path, out: Path, steps: int | None, *more: str) -> None:
    """Tune a bundle as the data owner, as the step `name`; `more` are additional words of the command.

    `steps` is the number of optimiser steps; None leaves the command's default.
    """
    config = chain.write_config(long_rows="skip")
    verb: Words = ["tune", bundle, "--data", chain.folder(TUNER, "train.jsonl"), "--out", out, "--config", config]
    verb += ["--resume", *more]
    if steps is not None:
        verb += ["--max-steps", str(steps)]
    leftovers = [out.with_name(f"{out.name}.run"), out.with_name(f"{out.name}.log.jsonl")]
    chain.command(name, description, verb, out, leftovers=leftovers, by=TUNER)


def _bounds(chain: Chain, base: Path, steps: int | None) -> ScoredModels:
    """Make two upper bounds for the plug-in: the adapter tuned on the uncompressed base, and all blocks but one tuned.

    Only for these bounds, the data owner gets the whole model: a bundle without compression contains all of its blocks.
    `steps` is the number of optimiser steps of each tuning; None leaves the command's default.
    """
    split = chain.results["pack"]["split"]
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    count = int(config.get("num_hidden_layers") or config["n_layer"])
    half = count // 2
    adapted = _bound(chain, base, "adapter on base", (split["bottom"], split["top"]), count, steps)
    tuned = _bound(chain, base, "full fine-tuning", (half, count - half - 1), count, steps, "--method", "full")
    return {"full fine-tuning": (tuned, None), "adapter on base": (base, adapted)}


def _bound(
    chain: Chain, base: Path, name: str, ends: tuple[int, int], count: int, steps: int | None, *method: str
) -> Path:
    """Pack a bundle without compression, tune it and plug in; returns the folder of the plug-in.

    Args:
        chain: the chain that runs the steps.
        base: the base folder.
        name: the name of the bound, with which the names of its steps begin.
        ends: the numbers of trained blocks at the bottom and at the top.
        count: the base's number of blocks.
        steps: optimiser steps of the tuning; None leaves the command's default.
        method: further words of the command `tune`.
    """
    bundle, returned, plugged = (chain.folder("bounds", name, part) for part in ("bundle", "return", "plugged"))
    pack: Words = ["pack", base, "--out", bundle, "--for", TUNER, "--bottom", str(ends[0]), "--top", str(ends[1])]
    pack += ["--keep", str(count - sum(ends)), "--heal", "none", "--no-score"]
    stamp = {"base": newest(base)}
    chain.command(f"{name}: pack", f"{name}: nothing is compressed", pack, bundle, stamp, by=OWNER)
    _tune(chain, f"{name}: tune", f"{name}: tune", bundle, returned, steps, *method)
    plug: Words = ["plug-in", base, returned, "--out", plugged]
    chain.command(f"{name}: plug-in", f"{name}: plug in", plug, plugged, again="--again", by=OWNER)
    return plugged


def _models_to_score(chain: Chain, base: Path) -> ScoredModels:
    """The models to score, keyed by name, each with its adapter; None if it needs none."""
    bundle, returned = chain.folder(TUNER, "bundle"), chain.folder(TUNER, "return")
    return {
        "zero-shot": (base, None),
        "emulator zero-shot": (bundle, None),
        "emulator": (bundle, returned),
        "plug-in": (base, chain.folder(OWNER, "plugged")),
    }


def _score(chain: Chain, base: Path, models: ScoredModels) -> dict[str, Any]:
    """Score each model on the test rows; neither party could score all of them. Returns the results by model name."""
    config = chain.write_config(long_rows="skip")
    scores: dict[str, Any] = {}
    for name, (model, adapter) in models.items():
        verb: Words = ["eval", model, "--data", chain.folder(TUNER, "test.jsonl"), "--config", config]
        verb += ["--adapter", adapter] if adapter else []
        verb += ["--samples", str(_SAMPLES)] if name in ("zero-shot", "plug-in") else []
        description, stamp = f"score the test rows: {name}", {"base": newest(base)}
        scores[name] = chain.command(f"eval {name}", description, verb, stamp=stamp, by=OWNER)
    return scores


def _sample(before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The first test row as an example: prompt, true docstring, answers of base and plug-in; {} without answers.

    `before` and `after` have the generated answers of base and plug-in, with prompts and true docstrings.
    """
    if not before or not after:
        return {}
    first, second = before[0], after[0]
    return {
        "prompt": first["prompt"],
        "reference": first["reference"],
        "zero-shot": first["answer"],
        "plug-in": second["answer"],
    }


def _settings(chain: Chain) -> dict[str, Any]:
    """The split of the bundle, and the method and LoRA settings of the return."""
    bundle, returned = chain.results["pack"], chain.results["tune"]
    return {"split": bundle["split"], "method": returned["method"], "lora": returned["lora"]}


def _step_count(full: bool) -> int:
    """The number of steps of the demo; `full` adds those of the two upper bounds."""
    return 19 + (8 if full else 0)


def newest(path: Path) -> int:
    """The time of the last change of a file, or of anything in a folder, in nanoseconds."""
    return max((part.stat().st_mtime_ns for part in (path, *(path.iterdir() if path.is_dir() else ()))), default=0)


def code_digest() -> str:
    """A digest of this package's code; if code or defaults change, results of an earlier run are not used."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(package)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()
