"""Choosing: a candidate's loss is that of its plug-in once written, and the best one wins only against the base."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifacts import (
    bottleneck_return,
    copied_folder,
    edit_weights,
    full_return,
    lora_return,
    packed,
    sign_again,
    with_earlier,
)
from model_owner.plugging_in.test_plug_in import plugged
from offsite.cli import main, show_choice
from offsite.config import EvalSpec, PlugInSpec, TuneSpec
from offsite.data_owner.tune import tune
from offsite.errors import PolicyError, UsageError, VerificationError
from offsite.evaluation.evaluate import evaluate
from offsite.model_owner.intake import intake
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.plugging_in import choose_plug_in
from offsite.model_owner.plugging_in.choose_plug_in import Choice, choose
from offsite.protocol.artifacts import Base, Bundle, Return
from offsite.protocol.verify import verify_return
from tiny import Parties, tiny_base, tiny_parties, tiny_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SMALL = {"device": "cpu", "threads": 1}
ALONE: dict[str, Any] = {"bottom": 1, "top": 1, "keep": 1}


def chosen(base: Path, returned: Path, rows: Path, parties: Parties, compute: Any = "fp32", **spec: Any) -> Choice:
    settings = PlugInSpec.model_validate({"again": True, **spec})
    measured = EvalSpec(compute=compute, **SMALL)  # type: ignore[arg-type]
    return choose(Base(base), intake(returned, parties.owner), rows, settings, measured, parties.owner)


def made(method: str, bundle: Bundle, out: Path, parties: Parties, seed: int) -> Return:
    home = parties.data_owner
    if method == "lora":
        return lora_return(bundle, out, home, b=0.1, seed=seed)
    if method == "bottleneck":
        return bottleneck_return(bundle, out, home, up=0.1, seed=seed)
    draw = np.random.default_rng(seed)
    return full_return(
        bundle, out, home, lambda _, a: a + 0.1 * draw.standard_normal(a.shape).astype(np.float32), method
    )


@pytest.mark.parametrize(("method", "form"), [("lora", "adapter"), ("lora", "merged"), ("bitfit", None)])
def test_candidates_of_a_narrower_bundle_have_the_bases_shapes(tmp_path: Path, method: str, form: Any) -> None:
    """Every block is narrower and carries an adapter, which is carried to the base before it is scored."""
    parties, rows = tiny_parties(tmp_path), tiny_rows(tmp_path / "rows.jsonl", 6)
    base = tiny_base(tmp_path / "base", "gpt2", 3)
    every = {"bottom": None, "top": None, "keep": None, "placement": "every", "mlp_width": 0.5}
    bundle = packed(base, tmp_path / "bundle", parties, **every)
    folder = made(method, bundle, tmp_path / "return", parties, 1).folder
    how: dict[str, Any] = {"as": form} if form else {}
    [one] = chosen(base, folder, rows, parties, strength=0.5, **how).candidates
    plug = plugged(base, folder, tmp_path / "plugged", parties, strength=0.5, **how)
    model, adapter = (base, plug.folder) if form == "adapter" else (plug.folder, None)
    measured = evaluate(model, rows, EvalSpec(compute="fp32", device="cpu", threads=1), adapter=adapter)
    assert one.loss == pytest.approx(measured.loss, rel=1e-6)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "method", "form"),
    [
        ("llama", "lora", "adapter"), ("llama", "lora", "merged"), ("gpt2", "lora", "merged"), ("gpt2", "full", None),
        ("gpt2", "bitfit", None), ("falcon", "bottleneck", None), ("qwen2_moe", "full", None),
    ],
)  # fmt: skip
def test_a_candidates_loss_is_what_evaluation_says_of_its_plug_in(
    tmp_path: Path, family: Any, method: str, form: Any, compute: Any
) -> None:
    """Of both checkpoints, one after the other: nothing of the first may stay behind."""
    parties, rows = tiny_parties(tmp_path), tiny_rows(tmp_path / "rows.jsonl", 6)
    base = tiny_base(tmp_path / "base", family, 4, dtype="bf16")
    bundle = packed(base, tmp_path / "bundle", parties, **ALONE)
    first, last = (made(method, bundle, tmp_path / f"return{seed}", parties, seed) for seed in (1, 2))
    folder = with_earlier(last, [first], parties.data_owner)
    how: dict[str, Any] = {"as": form} if form else {}
    spec = EvalSpec(compute=compute, **SMALL)  # type: ignore[arg-type]
    found = chosen(base, folder, rows, parties, compute, strength=1.25, **how)
    assert [(one.checkpoint, one.strength) for one in found.candidates] == [(1, 1.25), (2, 1.25)]
    assert found.base_loss == pytest.approx(evaluate(base, rows, spec).loss, rel=1e-6)
    for one in found.candidates:
        out = tmp_path / f"plugged{one.checkpoint}"
        plug = plugged(base, folder, out, parties, checkpoint=one.checkpoint, strength=one.strength, **how)
        if plug.manifest.form == "adapter":
            expected = evaluate(base, rows, spec, adapter=out)
        else:
            expected = evaluate(out, rows, spec)
        assert one.loss == pytest.approx(expected.loss, rel=1e-6)
        assert abs(one.loss - found.base_loss) > 1e-4
    assert abs(found.candidates[0].loss - found.candidates[1].loss) > 1e-4
    assert (found.rows, found.tokens) == (expected.rows, expected.tokens)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Parties]:
    """A base, a return of two checkpoints that was really tuned, and the rows."""
    folder = tmp_path_factory.mktemp("tuned")
    parties, rows = tiny_parties(folder), tiny_rows(folder / "rows.jsonl", 12)
    base = tiny_base(folder / "base", "llama", 4)
    bundle = packed(base, folder / "bundle", parties)
    spec = TuneSpec(rank=4, lr=5e-3, max_steps=12, batch_size=4, checkpoints=2, compute="fp32", **SMALL)  # type: ignore
    tune(bundle, rows, folder / "return", spec, parties.data_owner)
    return base, folder / "return", rows, parties


def test_the_best_of_the_grid_is_plugged_in(
    tuned: tuple[Path, Path, Path, Parties], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, returned, rows, parties = tuned
    (tmp_path / "settings.toml").write_text('[eval]\ncompute = "fp32"\ndevice = "cpu"\nthreads = 1\n')
    words = ["plug-in", base, returned, "--out", tmp_path / "plugged", "--choose-on", rows, "--again"]
    more = ["--config", tmp_path / "settings.toml", "--home", parties.owner.folder, "--json"]
    assert main([str(word) for word in (*words, *more)]) == 0
    shown = json.loads(capsys.readouterr().out)
    candidates = shown["choice"]["candidates"]
    grid = [(one["checkpoint"], one["strength"]) for one in candidates]
    usual = [(checkpoint, s) for checkpoint in (1, 2) for s in (0.25, 0.5, 0.75, 1.0, 1.25)]
    assert grid == [*usual, (2, 1.5)]  # since 1.25 was best, of the second checkpoint
    best = min(candidates, key=lambda one: one["loss"])
    assert best == shown["choice"]["best"]
    assert best["loss"] < shown["choice"]["base_loss"]
    assert (shown["checkpoint"], shown["strength"]) == (best["checkpoint"], best["strength"])
    spec = EvalSpec(compute="fp32", **SMALL)  # type: ignore[arg-type]
    assert evaluate(base, rows, spec, adapter=tmp_path / "plugged").loss == pytest.approx(best["loss"], rel=1e-6)
    with sqlite3.connect(parties.owner.ledger) as db:
        row = db.execute("SELECT checkpoint, strength FROM plug_ins ORDER BY id DESC LIMIT 1").fetchone()
    db.close()
    assert row == (best["checkpoint"], best["strength"])


def test_the_table_for_a_person(
    tuned: tuple[Path, Path, Path, Parties], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, returned, rows, parties = tuned
    words = ["plug-in", base, returned, "--out", tmp_path / "plugged", "--choose-on", rows, "--again"]
    more = ["--strengths", "0, 0.5,1", "--home", parties.owner.folder]
    assert main([str(word) for word in (*words, *more)]) == 0
    head, first, second, mark, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["loss", "at", "strength", "0", "(base)", "0.5", "1"]
    assert [first.split()[:2], second.split()[:2]] == [["checkpoint", "1"], ["checkpoint", "2"]]
    assert sum("*" in cell for line in (first, second) for cell in line.split()) == 1
    assert mark.startswith("* plugged in: checkpoint")


def test_a_return_that_is_worse_than_the_base_is_not_plugged_in_unasked(
    tuned: tuple[Path, Path, Path, Parties], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One tuned the other way round."""
    base, returned, rows, parties = tuned
    harm = copied_folder(returned, tmp_path / "harm")
    for file in harm.glob("*.safetensors"):
        edit_weights(file, lambda w: w.update({name: -array for name, array in w.items() if ".lora_B." in name}))
    sign_again(harm, parties.data_owner.identity())
    with pytest.raises(PolicyError, match="the base itself is best") as caught:
        chosen(base, harm, rows, parties)
    assert caught.value.reasons[0].startswith("the base: loss")
    assert len(caught.value.reasons) == 6
    words = [
        "plug-in",
        base,
        harm,
        "--out",
        tmp_path / "out",
        "--choose-on",
        rows,
        "--home",
        parties.owner.folder,
    ]
    assert main([str(word) for word in words]) == 5
    assert not (tmp_path / "out").exists()
    assert Ledger(parties.owner.ledger).plugged_in(verify_return(harm, parties.owner)) == []
    assert main([str(word) for word in (*words, "--strength", "0.5")]) == 0
    assert (tmp_path / "out").exists()
    capsys.readouterr()


def test_what_is_given_is_fixed(tuned: tuple[Path, Path, Path, Parties]) -> None:
    base, returned, rows, parties = tuned
    found = chosen(base, returned, rows, parties, checkpoint=1, strengths=[1.0, 0, 0.5, 0.5])
    assert [(one.checkpoint, one.strength) for one in found.candidates] == [(1, 0.5), (1, 1.0)]
    with pytest.raises(UsageError, match="has no checkpoint 3"):
        chosen(base, returned, rows, parties, checkpoint=3)


def parabola(monkeypatch: pytest.MonkeyPatch, best: float) -> None:
    """Losses of a base 1 above the best candidate, whose strength is `best`; every checkpoint has the same."""
    at = [0.0]
    monkeypatch.setattr(choose_plug_in._Trial, "become", lambda _, __, strength: at.__setitem__(0, strength))
    monkeypatch.setattr(choose_plug_in, "_loss", lambda *_: (at[0] / best - 1) ** 2)


@pytest.mark.parametrize(
    ("best", "tried", "edge"),
    [
        (0.7, [], None),
        (1.28, [1.5], None),
        (2.0, [1.5], None),  # the largest strength that there is
        (0.15, [0.125, 0.0625], None),
        (0.01, [0.125, 0.0625, 0.03125], "smallest"),
    ],
)
def test_the_grid_is_widened_where_the_best_is_at_its_edge(
    tuned: tuple[Path, Path, Path, Parties],
    monkeypatch: pytest.MonkeyPatch,
    best: float,
    tried: list[float],
    edge: str | None,
) -> None:
    """Of one checkpoint only: the first, as both are alike."""
    base, returned, rows, parties = tuned
    parabola(monkeypatch, best)
    if best == 0.01:
        with pytest.raises(PolicyError, match="the base itself is best") as caught:
            chosen(base, returned, rows, parties)
        assert "checkpoint 1 at strength 0.03125" in caught.value.reasons[1]
        return
    found = chosen(base, returned, rows, parties)
    usual = {(checkpoint, s) for checkpoint in (1, 2) for s in (0.25, 0.5, 0.75, 1.0, 1.25)}
    assert {(one.checkpoint, one.strength) for one in found.candidates} - usual == {(1, s) for s in tried}
    assert found.edge == edge
    assert len(show_choice.lines(found)) == 5


@pytest.mark.parametrize(("best", "says"), [(0.4, "smallest that was tried"), (1.3, "largest that was tried")])
def test_a_grid_that_was_given_is_not_widened_but_its_edge_is_told(
    tuned: tuple[Path, Path, Path, Parties], monkeypatch: pytest.MonkeyPatch, best: float, says: str
) -> None:
    base, returned, rows, parties = tuned
    parabola(monkeypatch, best)
    found = chosen(base, returned, rows, parties, strengths=[0.5, 0.75, 1.0])
    assert len(found.candidates) == 6
    assert says in show_choice.lines(found)[-2]


def test_what_does_not_fit_is_entered_as_refused(tuned: tuple[Path, Path, Path, Parties], tmp_path: Path) -> None:
    base, _, rows, parties = tuned
    bundle = packed(base, tmp_path / "bundle", parties)
    endless = lora_return(bundle, tmp_path / "return", parties.data_owner, b=7e37)
    with pytest.raises(VerificationError, match="at this strength"):
        chosen(base, endless.folder, rows, parties, strength=1.5)
    entries = Ledger(parties.owner.ledger).intakes(endless.digest)
    assert [state for state, _ in entries] == ["accepted", "refused"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--strengths", "0.5"], "no rows to choose on"),
        (["--choose-on", "x", "--plan"], "--plan does not know what --choose-on needs"),
        (["--choose-on", "x", "--eval-data", "y", "--plan"], "not know what --choose-on and --eval-data needs"),
        (["--chosen"], "--chosen tell how rows are read, and there are none"),
        (["--choose-on", "x", "--strengths", "0.5", "--strength", "1"], "strength and strengths were both given"),
        (["--choose-on", "x", "--strengths", "2"], "strengths.0: Input should be less"),
        (["--choose-on", "x", "--strengths", "half"], "strengths.0: Input should be a valid number"),
        (["--choose-on", "x", "--strengths", "0"], "no value but 0"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plug-in", "base", "return", "--out", "out", *flags]) == 2
    assert says in capsys.readouterr().err
