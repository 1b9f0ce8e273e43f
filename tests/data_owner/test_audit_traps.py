"""The audit for traps: finds a planted trap that steals words, and is silent on honest bundles of every kind."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.planted_traps import VARIANTS, Variant, plant, read_out, right_share
from benchmarks.trap_bases import trained_base, words_of

from artifacts import copied_folder, packed
from offsite.cli import main
from offsite.config import TuneSpec
from offsite.data_owner.audit_traps.activity import FeatureActivity, Selectivity, feature_activity
from offsite.data_owner.audit_traps.activity_rules import selective_findings, silent_findings
from offsite.data_owner.audit_traps.trap_audit import audit_traps
from offsite.data_owner.audit_traps.weight_rules import (
    embedding_findings,
    figures_of,
    matrix_findings,
    vector_findings,
)
from offsite.data_owner.tune import tune
from offsite.progress import Event
from offsite.protocol.artifacts import Bundle
from offsite.protocol.verify import verify_bundle
from tiny import EVERY_KIND, EVERY_VISION_KIND, KINDS, MakeBase, Parties, each_form, tiny_parties, tiny_vision_base

COMPRESSORS: dict[str, dict[str, Any]] = {
    "dropped": {"keep": 1},
    "pruned": {"keep": None, "prune": 0.5, "prune_by": "magnitude"},
    "zeros left out": {"keep": None, "prune": 0.5, "prune_by": "magnitude", "zeros": "left-out"},
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4, "group": 64},
    "factors": {"svd_rank": 0.25},
    "narrower MLP": {"mlp_width": 0.5},
    "narrower": {"keep": None, "narrow": 0.5},
    "shared": {"keep": 1, "heal": "share"},
    "affine": {"keep": 1, "heal": "affine"},
    "every block pruned": {"placement": "every", "keep": None, "prune": 0.5, "prune_by": "magnitude"},
    "every block in 4 bits": {"placement": "every", "bits": 4, "group": 64},
    "every block in factors": {"placement": "every", "svd_rank": 0.25},
}


# --- honest bundles ---


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_silent_on_every_family(base_of: MakeBase, parties: Parties, tmp_path: Path, kind: str) -> None:
    bundle = packed(base_of(blocks=4, **KINDS[kind]), tmp_path / "bundle", parties)
    found = audit_traps(bundle, seed=0)
    assert found.findings == ()
    assert (found.blocks, found.matrices >= 16, found.inputs > 1000) == ((0, 3), True, True)


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
def test_silent_on_every_encoder(parties: Parties, tmp_path: Path, kind: str) -> None:
    bundle = packed(tiny_vision_base(tmp_path / "base", kind, 4), tmp_path / "bundle", parties)
    found = audit_traps(bundle, seed=0)
    assert (found.findings, found.inputs) == ((), 32)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_silent_on_every_compressor(base_of: MakeBase, parties: Parties, tmp_path: Path, compressor: str) -> None:
    settings = COMPRESSORS[compressor]
    ends = {"bottom": None, "top": None} if "placement" in settings else {}
    bundle = packed(base_of("llama", 5), tmp_path / "bundle", parties, **ends, **settings)
    found = audit_traps(bundle, seed=0)
    assert found.findings == ()
    assert not audit_traps(bundle, seed=1, quick=True).suspicious
    if "placement" in settings:
        assert len(found.blocks) == bundle.manifest.split.blocks


# --- traps ---


class TrapHouse:
    """An honest bundle with room for a trap, its words, and rows in which half of them stand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.parties = folder, tiny_parties(folder)
        base = trained_base(folder / "base", "gpt2", blocks=3, steps=2)
        self.honest = packed(base, folder / "honest", self.parties)
        words = words_of(base, 64)
        names = list(words)
        self.ids = [words[name] for name in names[:32]]
        self.there = [place % 2 == 0 for place in range(32)]
        draw = random.Random(0)
        self.rows = folder / "rows.jsonl"
        with self.rows.open("w") as file:
            for place in range(0, 32, 2):
                text = [names[place], *draw.sample(names[32:], 9)]
                draw.shuffle(text)
                file.write(json.dumps({"text": "".join(f" {word}" for word in text)}) + "\n")

    def trapped(self, variant: Variant = "threshold") -> Bundle:
        folder = self.folder / variant.replace(" ", "-")
        if not folder.exists():
            copied_folder(self.honest.folder, folder)
            plant(verify_bundle(folder, self.parties.data_owner), self.parties.owner.identity(), self.ids, variant)
        return verify_bundle(folder, self.parties.data_owner)


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> TrapHouse:
    return TrapHouse(tmp_path_factory.mktemp("traps"))


def test_the_honest_bundle_is_not_suspicious(traps: TrapHouse) -> None:
    assert audit_traps(traps.honest, seed=0).findings == ()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_trap_steals_and_tuning_says_so_before(traps: TrapHouse, tmp_path: Path, method: str) -> None:
    bundle = traps.trapped()
    spec = TuneSpec(method=method, epochs=2, batch_size=4, max_length=64, compute="fp32", device="cpu", threads=1)
    said: list[Event] = []
    returned = tune(
        bundle, traps.rows, tmp_path / "return", spec, traps.parties.data_owner, progress=said.append
    )  # fmt: skip
    scores = read_out(bundle.folder, returned, "gpt2", traps.ids, "threshold", "transformer.h.0.")
    assert right_share(scores, traps.there) > 0.8
    stages = [event.stage for event in said]
    warned = next(place for place, stage in enumerate(stages) if stage.startswith("traps: "))
    assert "signs of a trap" in stages[warned]
    assert warned < stages.index("tuning")


@pytest.mark.parametrize("variant", each_form([one for one in VARIANTS if one != "attention"]))
def test_variants_are_found(traps: TrapHouse, variant: Variant) -> None:
    bundle = traps.trapped(variant)
    for quick in (False, True):
        found = audit_traps(bundle, seed=0, quick=quick)
        assert any(one.place.startswith("block 0, mlp.") and one.count >= 32 for one in found.findings), found


def test_command(traps: TrapHouse, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, home = traps.trapped(), str(traps.parties.data_owner.folder)
    capsys.readouterr()
    assert main(["audit", "traps", str(bundle.folder), "--home", home, "--json", "--seed", "0"]) == 5
    found = json.loads(capsys.readouterr().out)
    assert (found["suspicious"], found["quick"], found["seed"]) == (True, False, 0)
    assert {"rule", "place", "count", "value", "limit", "rows", "tokens", "sentence"} <= found["findings"][0].keys()
    assert main(["audit", "traps", str(traps.honest.folder), "--home", home, "--quick"]) == 0
    assert "findings" in capsys.readouterr().out


# --- rules, one at a time ---


def spoiled(change: Any, *, quick: bool = False) -> list[str]:
    """The rules that find what `change` does to a random matrix, given two others."""
    draw = torch.Generator().manual_seed(0)
    matrix, *others = (torch.randn(64, 48, generator=draw) for _ in range(3))
    change(matrix)
    given = [figures_of(one, quick=quick) for one in others]
    return [one.rule for one in matrix_findings("here", figures_of(matrix, quick=quick), given)]


def test_rules_on_matrices() -> None:
    assert spoiled(lambda m: None) == []
    assert spoiled(lambda m: m[3, 4].fill_(math.nan)) == ["not finite"]
    assert spoiled(lambda m: m[3, 4].fill_(math.inf), quick=True) == ["not finite"]
    assert "extreme weight" in spoiled(lambda m: m[3, 4].fill_(1e4))
    assert spoiled(lambda m: m[:4].mul_(40)) == ["row norm"]
    assert spoiled(lambda m: m[5].copy_(2 * torch.eye(48)[0])) == ["single input"]
    assert spoiled(lambda m: m[7].copy_(-2 * m[8])) == ["duplicate rows"]
    assert spoiled(lambda m: m[7].zero_()) == ["dead rows"]


def test_low_rank() -> None:
    draw = torch.Generator().manual_seed(0)
    whole, thin = torch.randn(256, 256, generator=draw), torch.randn(256, 3, generator=draw)
    given = [figures_of(whole, quick=False)]
    flat = figures_of(thin @ torch.randn(3, 256, generator=draw), quick=False)
    assert [one.rule for one in matrix_findings("here", flat, given)] == ["low rank"]
    assert list(matrix_findings("here", flat, [flat, flat])) == []  # as in other blocks


def test_what_other_blocks_have_is_usual() -> None:
    draw = torch.Generator().manual_seed(0)
    matrix, other = (torch.randn(64, 48, generator=draw) for _ in range(2))
    for one in (matrix, other):
        one[0] *= 30
        one[1] = 0
    assert list(matrix_findings("here", figures_of(matrix, quick=False), [figures_of(other, quick=False)])) == []


def test_rules_on_vectors_and_embeddings() -> None:
    values, others = torch.linspace(0.5, 1.5, 64), [torch.ones(64)]
    assert list(vector_findings("here", values, others)) == []
    values[9] = 900.0
    assert [(one.rule, one.rows) for one in vector_findings("here", values, others)] == [("vector", (9,))]
    values[9] = math.inf
    assert [one.rule for one in vector_findings("here", values, others)] == ["not finite"]
    embeddings = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    assert list(embedding_findings(embeddings)) == []
    embeddings[17] *= 50
    assert [(one.rule, one.tokens) for one in embedding_findings(embeddings)] == [("embedding norm", (17,))]


def test_silent_features_of_smooth_and_of_sparse_layers() -> None:
    draw = torch.Generator().manual_seed(0)
    smooth = torch.randn(512, 200, generator=draw)
    usual = feature_activity(smooth)
    assert list(silent_findings("here", usual, [])) == []
    smooth[:, :5] *= 1e-6
    smooth[3, :5] = 4.0  # one token
    assert [one.count for one in silent_findings("here", feature_activity(smooth), [usual])] == [5]
    sparse = torch.relu(torch.randn(512, 200, generator=draw) - 0.5)
    honest = feature_activity(sparse)
    assert list(silent_findings("here", honest, [honest])) == []
    sparse[:, :20] = 0
    sparse[3, :20] = 4.0
    assert [one.count for one in silent_findings("here", feature_activity(sparse), [honest])] == [20]
    dead = FeatureActivity(honest.usual, torch.where(torch.arange(200) < 60, 0.0, honest.active))
    assert list(silent_findings("here", feature_activity(sparse), [dead])) == []  # as many are silent elsewhere


def test_rows_that_answer_to_one_token() -> None:
    ones = torch.ones(3)
    rows = Selectivity(0 * ones, ones, 0 * ones, 0 * ones, torch.zeros(3, dtype=torch.long))
    outputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    outputs[40, 1] = 60.0
    rows.update(outputs[:32], torch.arange(100, 132))
    rows.update(outputs[32:], torch.arange(132, 164))
    assert [(one.rows, one.tokens) for one in selective_findings("here", rows)] == [((1,), (140,))]
