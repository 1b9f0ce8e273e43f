"""Measures `offsite audit traps`: how many trapped bundles it finds, and how many honest ones it takes for trapped.

    python -m benchmarks.traps [--work FOLDER] [--report]

Trapped bundles ask for 64 words (see `benchmarks.planted_traps`), in several variants and strengths, down to strengths
at which the trap steals next to nothing. One of each kind is tuned on rows in which 32 of the words stand, and read
out: "stolen" is the share of the 64 words that the trap then gets right (0.5 is chance). Honest bundles have every
compressor. The bases are models of 128 channels that are trained for a moment, and blocks of SmolLM2-135M-Instruct if
the demo has fetched it. A run continues where an earlier one in the same folder stopped.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.planted_traps import plant, read_out, right_share
from benchmarks.trap_bases import sliced_base, trained_base, words_of
from benchmarks.work import ROOT, commit, machine

sys.path.insert(0, str(ROOT / "tests"))

from artifacts import packed
from offsite import TuneSpec, tune, verify_bundle
from offsite.data_owner.audit_traps.trap_audit import audit_traps
from offsite.protocol.home import Home
from tiny import Parties, tiny_parties

RESULT = Path(__file__).parent / "results" / "traps.json"
REAL = Path.home() / ".cache" / "offsite" / "SmolLM2-135M-Instruct" / "base"
WORDS = 64
HONEST: dict[str, dict[str, Any]] = {
    "blocks dropped": {"keep": 1},
    "blocks dropped, refit": {"keep": 2, "heal": "refit"},
    "bf16": {"dtype": "bf16"},
    "magnitude": {"prune": 0.5, "prune_by": "magnitude"},
    "wanda": {"prune": 0.5, "prune_by": "wanda"},
    "sparsegpt, refit": {"prune": 0.5, "prune_by": "sparsegpt", "heal": "refit"},
    "zeros left out": {"prune": 0.5, "prune_by": "magnitude", "zeros": "left-out"},
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4, "group": 64},
    "factors": {"svd_rank": 0.25},
    "narrower MLP": {"mlp_width": 0.5},
    "fewer heads and neurons": {"narrow": 0.5},
    "shared": {"keep": 1, "heal": "share"},
    "affine": {"keep": 1, "heal": "affine"},
    "every block, magnitude": {"placement": "every", "prune": 0.5, "prune_by": "magnitude"},
    "every block, 4 bits": {"placement": "every", "bits": 4, "group": 64},
    "every block, factors": {"placement": "every", "svd_rank": 0.25},
}
TRAPS = (
    *(("threshold", strength) for strength in (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)),
    *(("spread", strength) for strength in (1.0, 0.25, 0.05)),
    *(("behind a norm", strength) for strength in (1.0, 0.25, 0.05)),
    *(("attention", strength) for strength in (1.0,)),
)
PARTS = ("trapped", "honest", "real")
_WITH_TWO_SETS = 3  # how many of the traps are planted for two sets of words


@dataclass(frozen=True)
class Workshop:
    """A base with its honest bundle, the words, and the rows."""

    name: str
    model_type: str
    base: Path
    parties: Parties
    words: Mapping[str, int]

    def rows(self, file: Path, seed: int) -> tuple[list[str], list[bool]]:
        """Write rows in which half of the words of the trap stand; returns the words, and which do."""
        draw = random.Random(seed)
        names = list(self.words)
        asked = draw.sample(names, min(WORDS, len(names) // 2))
        others = [word for word in names if word not in asked]
        there = set(draw.sample(asked, len(asked) // 2))
        lines, left = [], sorted(there)
        draw.shuffle(left)
        while left:
            mine, left = left[:2], left[2:]
            text = [*mine, *(draw.choice(others) for _ in range(14))]
            draw.shuffle(text)
            lines.append(json.dumps({"text": "".join(f" {word}" for word in text)}))
        file.write_text("".join(f"{line}\n" for line in lines * 2))
        return asked, [word in there for word in asked]


def main() -> None:
    """Measure what is not yet measured, write the result and print it as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "offsite" / "benchmarks" / "traps")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--part", choices=PARTS, help="only these bundles; several parts may run side by side")
    parser.add_argument("--report", action="store_true", help="write the result from what was measured so far")
    wanted = parser.parse_args()
    wanted.work.mkdir(parents=True, exist_ok=True)
    log = wanted.work / "records.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not wanted.report:
        for part, key, measure in _cases(wanted.work):
            if wanted.part not in (None, part) or key in {record["key"] for record in records}:
                continue
            record = {"key": key, **measure()}
            print(record, flush=True)
            records.append(record)
            with log.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
    records = [json.loads(line) for line in log.read_text().splitlines()]  # also those of runs side by side
    result = {"machine": machine(1), "commit": commit(), **summary(records), "records": records}
    wanted.result.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def _cases(work: Path) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Yield the part and the key of each bundle to make, and the function that makes and measures it."""
    shops = [_workshop(work, kind) for kind in ("llama", "gpt2", "qwen3")]
    for number, (variant, strength) in enumerate(TRAPS):
        for shop in shops:
            for words in range(2 if number < _WITH_TWO_SETS else 1):
                key = f"{shop.name}, {variant}, {strength}, words {words}"
                tuned = words == 0 and shop.name != "qwen3"  # which differs from Llama by two norms alone
                yield "trapped", key, partial(_trapped, work, shop, variant, strength, words, tuned=tuned)
    for name, settings in HONEST.items():
        for shop in shops:
            yield "honest", f"{shop.name}, honest, {name}", partial(_honest, work, shop, name, settings)
    if REAL.exists():
        shop = _real_workshop(work, (0, 1, 2, 29))
        yield "real", f"{shop.name}, honest", partial(_honest, work, shop, "bf16", {"dtype": "bf16"})
        for name, strength in (("threshold", 1.0), ("faint threshold", 0.1)):
            trapped = partial(_trapped, work, shop, "threshold", strength, 0, tuned=False)
            yield "real", f"{shop.name}, {name}", trapped


def _workshop(work: Path, kind: str) -> Workshop:
    base = work / f"base-{kind}"
    if not (base / "model.safetensors").exists():
        trained_base(base, kind)
    return Workshop(kind, kind, base, _parties(work), words_of(base, 2 * WORDS))


def _real_workshop(work: Path, kept: tuple[int, ...]) -> Workshop:
    base = work / f"base-real-{len(kept)}"
    if not (base / "model.safetensors").exists():
        shutil.rmtree(base, ignore_errors=True)
        sliced_base(REAL, base, kept)
    return Workshop(
        f"SmolLM2's blocks {', '.join(map(str, kept))}", "llama", base, _parties(work), words_of(base, 2 * WORDS)
    )


def _parties(work: Path) -> Parties:
    if (work / "acme-home").exists():
        return Parties(Home(work / "acme-home"), Home(work / "hospital-home"))
    return tiny_parties(work)


def _honest(work: Path, shop: Workshop, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Pack an honest bundle and audit it."""
    folder = work / f"bundle-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    keep = {} if {"keep", "placement", "prune", "narrow"} & set(settings) else {"keep": 2}
    if "keep" not in settings and not keep:
        keep = {"keep": None}
    ends = {"bottom": None, "top": None} if "placement" in settings else {}
    packed(shop.base, folder, shop.parties, **{**keep, **ends, "dtype": "fp32", **settings})
    return {"kind": "honest", "base": shop.name, "variant": name, **_audited(folder, shop)}


def _trapped(
    work: Path, shop: Workshop, variant: Any, strength: float, seed: int, *, tuned: bool = True
) -> dict[str, Any]:
    """Plant a trap in an honest bundle, audit it, tune it, and read out which words stood in the rows."""
    folder, rows = work / f"bundle-{os.getpid()}", work / f"rows-{os.getpid()}.jsonl"
    shutil.rmtree(folder, ignore_errors=True)
    honest = packed(shop.base, folder, shop.parties, keep=1)
    asked, there = shop.rows(rows, seed)
    ids = [shop.words[word] for word in asked]
    plant(honest, shop.parties.owner.identity(), ids, variant, strength, seed)
    record = {
        "kind": "trapped", "base": shop.name, "variant": variant, "strength": strength, **_audited(folder, shop),
    }  # fmt: skip
    for method in ("lora", "full") if tuned else ():
        out = work / f"return-{os.getpid()}"
        shutil.rmtree(out, ignore_errors=True)
        spec = TuneSpec(method=method, epochs=1, batch_size=4, max_length=64, compute="fp32", device="cpu", threads=1)
        bundle = verify_bundle(folder, shop.parties.data_owner, hold=True)
        returned = tune(bundle, rows, out, spec, shop.parties.data_owner)
        block = bundle.manifest.family.in_block(0, "")
        scores = read_out(folder, returned, shop.model_type, ids, variant, block)
        record[f"stolen by {method}"] = round(right_share(scores, there), 3)
    return record


def _audited(folder: Path, shop: Workshop) -> dict[str, Any]:
    """Audit a bundle, whole and with the quick part alone."""
    bundle = verify_bundle(folder, shop.parties.data_owner, hold=True)
    whole, started = audit_traps(bundle, seed=0), time.process_time()
    quick = audit_traps(verify_bundle(folder, shop.parties.data_owner, hold=True), quick=True, seed=0)
    return {
        "found": whole.suspicious,
        "found by the quick part": quick.suspicious,
        "rules": sorted({f"{one.rule}: {one.place}" for one in whole.findings}),
        "processor_s of the quick part": round(time.process_time() - started, 2),
    }


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The rates over all bundles."""
    trapped = [one for one in records if one["kind"] == "trapped"]
    honest = [one for one in records if one["kind"] == "honest"]
    stealing = [one for one in trapped if max(stolen(one), default=0.0) >= 0.6]
    return {
        "trapped": len(trapped),
        "honest": len(honest),
        "detected": sum(one["found"] for one in trapped),
        "detected by the quick part": sum(one["found by the quick part"] for one in trapped),
        "stealing at least 60 %": len(stealing),
        "of these detected": sum(one["found"] for one in stealing),
        "of these detected by the quick part": sum(one["found by the quick part"] for one in stealing),
        "false alarms": sum(one["found"] for one in honest),
        "false alarms of the quick part": sum(one["found by the quick part"] for one in honest),
    }


def stolen(record: Mapping[str, Any]) -> list[float]:
    """The shares of words that a trap got right."""
    return [record[f"stolen by {method}"] for method in ("lora", "full") if f"stolen by {method}" in record]


def table(result: Mapping[str, Any]) -> str:
    """A Markdown table: detection by variant and strength, and false alarms."""
    lines = [
        "| trap | strength | bundles | detected | by the quick part | words right, LoRA | words right, whole blocks |",
        "|---|---|---|---|---|---|---|",
    ]
    trapped = [one for one in result["records"] if one["kind"] == "trapped"]
    for variant, strength in TRAPS:
        mine = [one for one in trapped if (one["variant"], one["strength"]) == (variant, strength)]
        if mine:
            lines.append(
                f"| {variant} | {strength:g} | {len(mine)} | {sum(one['found'] for one in mine)} |"
                f" {sum(one['found by the quick part'] for one in mine)} | {_range(mine, 'lora')} |"
                f" {_range(mine, 'full')} |"
            )
    lines += [
        "",
        (
            f"Of {result['trapped']} trapped bundles {result['detected']} are detected"
            f" ({result['detected by the quick part']} by the quick part); of the"
            f" {result['stealing at least 60 %']} that got at least 60 % of the words right,"
            f" {result['of these detected']}"
            f" ({result['of these detected by the quick part']}). Of {result['honest']} honest bundles"
            f" {result['false alarms']} raise a false alarm ({result['false alarms of the quick part']})."
        ),
    ]
    return "\n".join(lines)


def _range(records: list[dict[str, Any]], method: str) -> str:
    found = sorted(one[f"stolen by {method}"] for one in records if f"stolen by {method}" in one)
    return f"{found[0]:.0%} to {found[-1]:.0%}" if found else ""


if __name__ == "__main__":
    main()
