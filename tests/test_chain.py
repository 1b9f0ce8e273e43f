"""The whole protocol through the public stages, both methods, both families; what is handed over is a folder."""

import itertools
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import offsite
from offsite import Base, EvalSpec, PackSpec, PlugInSpec, TuneSpec
from offsite.config import Method
from offsite.errors import PolicyError, UsageError
from offsite.model_owner.ledger import Ledger
from offsite.protocol.contents import WEIGHTS_OF
from offsite.protocol.manifest import MANIFEST
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_float32, read_header
from tiny import EVERY_KIND, FAMILIES, KINDS, Family, tiny_base, tiny_parties, tiny_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
EXACT = EvalSpec(compute="fp32", device="cpu", threads=1)


def tuning(method: Method, **settings: Any) -> TuneSpec:
    return TuneSpec.model_validate(
        {
            "method": method,
            "rank": 4,
            "lr": 3e-3,
            "max_steps": 6,
            "batch_size": 4,
            "compute": "fp32",
            "device": "cpu",
            "threads": 1,
            "max_length": 64,
            **settings,
        }
    )


@pytest.mark.parametrize(
    ("method", "family"),
    [*itertools.product(("lora", "full", "bottleneck"), FAMILIES), ("bitfit", "gpt2"), ("bitfit", "opt")],
)
def test_the_chain(tmp_path: Path, family: Family, method: Method) -> None:
    parties = tiny_parties(tmp_path)
    base = Base(tiny_base(tmp_path / "base", family, 5))
    rows = tiny_rows(tmp_path / "rows.jsonl", 12)
    spec = PackSpec(bottom=1, top=1, keep=1, heal="none", dtype="fp32", max_rank=4)
    bundle = offsite.pack(base, tmp_path / "bundle", "hospital", spec, parties.owner)

    assert offsite.verify_bundle(tmp_path / "bundle", parties.data_owner) == bundle
    returned = offsite.tune(bundle, rows, tmp_path / "return", tuning(method), parties.data_owner)
    assert offsite.verify_return(tmp_path / "return", parties.data_owner, bundle.manifest) == returned

    made = offsite.plug_in(
        base, offsite.intake(tmp_path / "return", parties.owner), tmp_path / "plugged", PlugInSpec(), parties.owner
    )
    assert offsite.verify(tmp_path / "plugged", parties.owner) == made
    assert (made.manifest.bundle, made.manifest.returned) == (bundle.digest, returned.digest)
    beside = method in ("lora", "bottleneck")
    assert made.manifest.form == ("adapter" if beside else "merged")
    adapter = made.folder if beside else None
    model = base.folder if beside else made.folder
    plugged = offsite.evaluate(model, rows, EXACT, adapter=adapter)
    zero_shot = offsite.evaluate(base.folder, rows, EXACT)
    assert plugged.tokens == zero_shot.tokens > 0
    assert plugged.loss != zero_shot.loss

    with pytest.raises(PolicyError, match="was plugged in before"):
        offsite.plug_in(
            base, offsite.intake(tmp_path / "return", parties.owner), tmp_path / "twice", PlugInSpec(), parties.owner
        )
    with pytest.raises(PolicyError, match="would refuse this tuning"):
        refused = tuning("lora", rank=5)
        offsite.tune(bundle, rows, tmp_path / "refused", refused, parties.data_owner)
    issued = Ledger(parties.owner.ledger).issued(bundle.digest)
    assert issued is not None
    assert (issued.state, issued.kept) == ("plugged in", (0, 1, 4))


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_nothing_compressed_means_nothing_lost(tmp_path: Path, kind: str, method: Literal["lora", "full"]) -> None:
    """The data owner's tuned emulator and the owner's plug-in are then the same model: every view scores alike."""
    parties = tiny_parties(tmp_path)
    base = Base(tiny_base(tmp_path / "base", blocks=4, **KINDS[kind]))
    rows = tiny_rows(tmp_path / "rows.jsonl", 12)
    spec = PackSpec(bottom=1, top=1, keep=2, dtype="fp32", max_rank=4)  # nothing to heal
    bundle = offsite.pack(base, tmp_path / "bundle", "hospital", spec, parties.owner)
    returned = offsite.tune(bundle, rows, tmp_path / "return", tuning(method), parties.data_owner)
    merged = offsite.plug_in(
        base,
        offsite.intake(returned.folder, parties.owner),
        tmp_path / "merged",
        PlugInSpec(as_="merged"),
        parties.owner,
    )
    losses = {
        "zero-shot": offsite.evaluate(base.folder, rows, EXACT).loss,
        "merged": offsite.evaluate(merged.folder, rows, EXACT).loss,
        "the data owner's view": offsite.evaluate(tmp_path / "bundle", rows, EXACT, adapter=returned.folder).loss,
    }
    if method == "lora":
        adapter = offsite.plug_in(
            base,
            offsite.intake(returned.folder, parties.owner),
            tmp_path / "adapter",
            PlugInSpec(again=True),
            parties.owner,
        )
        losses["adapter"] = offsite.evaluate(base.folder, rows, EXACT, adapter=adapter.folder).loss
    expected = losses["merged"]
    for name in set(losses) - {"zero-shot"}:
        assert losses[name] == pytest.approx(expected, abs=1e-5), losses
    assert expected < losses["zero-shot"] - 1e-3


@pytest.mark.parametrize("kind", ["llama untied", "gpt2 tied", "falcon, new decoder", "mixtral"])
def test_nothing_lost_with_bottlenecks(tmp_path: Path, kind: str) -> None:
    """The same for the form that cannot be merged: the data owner's view and the plug-in score alike."""
    parties = tiny_parties(tmp_path)
    base = Base(tiny_base(tmp_path / "base", blocks=4, **KINDS[kind]))
    rows = tiny_rows(tmp_path / "rows.jsonl", 12)
    spec = PackSpec(bottom=1, top=1, keep=2, heal="none", dtype="fp32")
    bundle = offsite.pack(base, tmp_path / "bundle", "hospital", spec, parties.owner)
    settings = tuning("bottleneck", width=8, lr=1e-2)
    returned = offsite.tune(bundle, rows, tmp_path / "return", settings, parties.data_owner)
    made = offsite.plug_in(
        base, offsite.intake(returned.folder, parties.owner), tmp_path / "plugged", PlugInSpec(), parties.owner
    )
    plugged = offsite.evaluate(base.folder, rows, EXACT, adapter=made.folder).loss
    assert plugged == pytest.approx(
        offsite.evaluate(tmp_path / "bundle", rows, EXACT, adapter=returned.folder).loss, abs=1e-5
    )
    assert plugged < offsite.evaluate(base.folder, rows, EXACT).loss - 1e-3


def _changed_blocks(base: Base, made: offsite.PlugIn, method: Method) -> set[int]:
    """The base's blocks in which a plug-in changes something."""
    if made.manifest.form == "merged":
        before, after = (open_checkpoint(folder).tensors for folder in (base.folder, made.folder))
        names = {name for name in before if not np.array_equal(read_float32(before[name]), read_float32(after[name]))}
    else:
        names = set(read_header(made.folder / WEIGHTS_OF[method]))
    return {int(name.removeprefix("base_model.model.").split(".")[2]) for name in names}


@pytest.mark.parametrize(("bottom", "top"), [(2, 0), (0, 2)])
@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "bottleneck"])
def test_placed_at_one_end(tmp_path: Path, method: Method, bottom: int, top: int) -> None:
    """Only first or only last blocks train; what comes back lands in those blocks of the base and in no other."""
    parties = tiny_parties(tmp_path)
    base = Base(tiny_base(tmp_path / "base", "gpt2", 6))
    rows = tiny_rows(tmp_path / "rows.jsonl", 8)
    spec = PackSpec(bottom=bottom, top=top, keep=2, heal="refit", dtype="fp32", calibration_tokens=256)
    bundle = offsite.pack(base, tmp_path / "bundle", "hospital", spec, parties.owner)
    assert bundle.manifest.split.trained == ((0, 1) if bottom else (2, 3))
    settings = tuning(method, max_steps=2)
    returned = offsite.tune(bundle, rows, tmp_path / "return", settings, parties.data_owner)
    made = offsite.plug_in(
        base, offsite.intake(returned.folder, parties.owner), tmp_path / "plugged", PlugInSpec(), parties.owner
    )
    assert _changed_blocks(base, made, method) == ({0, 1} if bottom else {4, 5})
    model, adapter = (base.folder, made.folder) if made.manifest.form == "adapter" else (made.folder, None)
    assert offsite.evaluate(model, rows, EXACT, adapter=adapter).loss != offsite.evaluate(base.folder, rows, EXACT).loss


def _spread(tmp_path: Path, family: Family, **settings: Any) -> tuple[Base, offsite.Bundle, Any]:
    """A bundle of six blocks of which 0, 2 and 5 train, and both parties."""
    parties = tiny_parties(tmp_path)
    base = Base(tiny_base(tmp_path / "base", family, 6))
    spec = PackSpec(train=(5, 0, 2), dtype="fp32", calibration_tokens=256, max_rank=4, **settings)
    return base, offsite.pack(base, tmp_path / "bundle", "hospital", spec, parties.owner), parties


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "full", "bottleneck"])
def test_a_list_of_blocks(tmp_path: Path, family: Family, method: Method) -> None:
    """Blocks between frozen ones train too; what comes back lands in those blocks of the base and in no other."""
    base, bundle, parties = _spread(tmp_path, family, keep=2, heal="refit")
    split = bundle.manifest.split
    assert (split.bottom, split.emulator, split.top, split.spread) == (1, 3, 1, (2,))
    assert (split.trained, bundle.manifest.requires) == ((0, 2, 4), ("spread",))
    assert offsite.verify_bundle(bundle.folder, parties.data_owner) == bundle
    rows = tiny_rows(tmp_path / "rows.jsonl", 8)
    settings = tuning(method, max_steps=2)
    returned = offsite.tune(bundle, rows, tmp_path / "return", settings, parties.data_owner)
    made = offsite.plug_in(
        base, offsite.intake(returned.folder, parties.owner), tmp_path / "plugged", PlugInSpec(), parties.owner
    )
    assert _changed_blocks(base, made, method) == {0, 2, 5}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_list_of_blocks_with_nothing_compressed_loses_nothing(tmp_path: Path, family: Family) -> None:
    base, bundle, parties = _spread(tmp_path, family, keep=3, heal="none")
    rows = tiny_rows(tmp_path / "rows.jsonl", 12)
    returned = offsite.tune(bundle, rows, tmp_path / "return", tuning("lora"), parties.data_owner)
    made = offsite.plug_in(
        base, offsite.intake(returned.folder, parties.owner), tmp_path / "plugged", PlugInSpec(), parties.owner
    )
    own = offsite.evaluate(bundle.folder, rows, EXACT, adapter=returned.folder).loss
    assert offsite.evaluate(base.folder, rows, EXACT, adapter=made.folder).loss == pytest.approx(own, abs=1e-5)
    assert own < offsite.evaluate(base.folder, rows, EXACT).loss - 1e-3


@pytest.mark.parametrize(("prune", "changed"), [(0.0, {4}), (0.5, {1, 4})])
def test_healing_goes_through_trained_blocks_and_leaves_them_as_they_are(
    tmp_path: Path, prune: float, changed: set[int]
) -> None:
    """Block 3 is dropped behind block 2, which trains, so block 4 makes up for it; up to there nothing is lost."""
    base, bundle, _ = _spread(tmp_path, "llama", keep=2, heal="refit", prune=prune)
    ours, theirs = (open_checkpoint(folder).tensors for folder in (bundle.folder, base.folder))
    path = "model.layers.{}.mlp.down_proj.weight"
    for place, index in enumerate((0, 1, 2, 4, 5)):
        same = np.array_equal(read_float32(ours[path.format(place)]), read_float32(theirs[path.format(index)]))
        assert same == (index not in changed), index


def test_a_list_that_is_two_ends_is_two_ends(tmp_path: Path) -> None:
    parties = tiny_parties(tmp_path)
    base = Base(tiny_base(tmp_path / "base", "llama", 5))
    specs = {"counted": PackSpec(bottom=1, top=2, keep=1), "listed": PackSpec(train=(0, 3, 4), keep=1)}
    one, other = (
        offsite.pack(base, tmp_path / name, "hospital", spec.changed({"heal": ()}), parties.owner).manifest
        for name, spec in specs.items()
    )
    assert (one.split, one.requires, one.files) == (other.split, other.requires, other.files)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train": (0, 6)}, "blocks that the base does not have: 6"),
        ({"train": (0, 1, 2, 3, 4, 5)}, "cannot keep any blocks"),
        ({"train": (0, 2), "keep": 5}, "of a middle of 4"),
        ({"train": (0, 2), "keep": 2, "select": "cluster"}, "no trained blocks between frozen ones"),
        ({"train": (0, 2), "keep": 2, "heal": ("refit", "distill")}, "no trained blocks between frozen ones"),
        ({"train": (0, 2), "bits": 8}, "no trained blocks between frozen ones"),
        ({"train": (0, 2), "zeros": "left-out"}, "no trained blocks between frozen ones"),
    ],
)
def test_lists_of_blocks_that_are_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    parties = tiny_parties(tmp_path)
    base = Base(tiny_base(tmp_path / "base", "llama", 6))
    with pytest.raises(UsageError, match=says) as caught:
        offsite.pack(base, tmp_path / "bundle", "hospital", PackSpec.model_validate(settings), parties.owner)
    assert caught.value.next_step
    assert not (tmp_path / "bundle").exists()


def test_untuned_is_untouched(tmp_path: Path) -> None:
    """A step of size next to nothing: the merged model is the base but for that step."""
    parties = tiny_parties(tmp_path)
    base = Base(tiny_base(tmp_path / "base", "llama", 4, dtype="bf16"))
    rows = tiny_rows(tmp_path / "rows.jsonl", 4)
    spec = PackSpec(bottom=1, top=1, keep=1, heal="none", dtype="bf16")
    bundle = offsite.pack(base, tmp_path / "bundle", "hospital", spec, parties.owner)
    tiny_step = tuning("full", lr=1e-12, max_steps=1)
    returned = offsite.tune(bundle, rows, tmp_path / "return", tiny_step, parties.data_owner)
    merged = offsite.plug_in(
        base, offsite.intake(returned.folder, parties.owner), tmp_path / "merged", PlugInSpec(), parties.owner
    )
    ours, theirs = (folder / "model.safetensors" for folder in (merged.folder, base.folder))
    from safetensors.torch import load_file

    before = load_file(theirs)
    assert all(bool((tensor == before[name]).all()) for name, tensor in load_file(ours).items())


def test_a_return_tells_nothing_by_accident(tmp_path: Path) -> None:
    parties = tiny_parties(tmp_path)
    base = Base(tiny_base(tmp_path / "base", "llama", 4))
    rows = tiny_rows(tmp_path / "SECRET-rows.jsonl", 12)
    bundle = offsite.pack(
        base, tmp_path / "bundle", "hospital", PackSpec(bottom=1, top=1, keep=1, heal="none"), parties.owner
    )
    offsite.tune(bundle, rows, tmp_path / "return", tuning("lora"), parties.data_owner, eval_data=rows)
    assert {p.name for p in (tmp_path / "return").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", MANIFEST, f"{MANIFEST}.sig",
    }  # fmt: skip
    for file in (tmp_path / "return").iterdir():
        content = file.read_bytes()
        for word in (b"SECRET", b"hospital", b"acme", b"rows", b"loss", str(tmp_path).encode()):
            assert word not in content, (file.name, word)
    manifest = json.loads((tmp_path / "return" / MANIFEST).read_text())
    assert set(manifest["lora"]) == {"rank", "alpha", "targets"}
