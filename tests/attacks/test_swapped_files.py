"""Files that become others between verifying and use: what was verified is used, or nothing is.

The one who swaps them may write to the folder at any time; nothing of it is signed anew, since that would be another
artifact.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import offsite
from artifacts import edit_weights
from attacks.lab import Lab
from offsite.config import EvalSpec, PlugInSpec, TuneSpec
from offsite.data_owner.tune import tune
from offsite.errors import VerificationError
from offsite.evaluation.evaluate import evaluate
from offsite.evaluation.image_scores import evaluate_images
from offsite.model_owner.base_model import require_unchanged
from offsite.model_owner.plugging_in.choose_plug_in import choose
from offsite.model_owner.plugging_in.plug_in import open_base_of, plug_in
from offsite.models.model_folder import as_folder
from offsite.progress import silent
from offsite.protocol.artifacts import Base
from offsite.protocol.manifest import MANIFEST, SIGNATURE
from offsite.protocol.verify import verify_bundle
from tiny import tiny_pictures, tiny_rows

Swap = Callable[[Path], None]


def _hostile(file: Path) -> bytes:
    """Other content of the same length: weights that are NaN, text that is none."""
    content = file.read_bytes()
    kept = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else 0
    return content[:kept] + b"\xff" * (len(content) - kept)


def renamed_over(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(_hostile(file))
    other.replace(file)


def changed_in_place(file: Path) -> None:
    content = _hostile(file)
    with file.open("r+b") as stream:
        stream.write(content)


def grown(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\0" * 64)


def shrunk(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def link_swapped_in(file: Path) -> None:
    elsewhere = file.parent.parent / f"elsewhere-{file.name}"
    elsewhere.write_bytes(_hostile(file))
    file.unlink()
    file.symlink_to(elsewhere)


def link_to_the_same_bytes(file: Path) -> None:
    elsewhere = file.parent.parent / f"elsewhere-{file.name}"
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)


def pipe_swapped_in(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def removed(file: Path) -> None:
    file.unlink()


SWAPS = (
    renamed_over,
    changed_in_place,
    grown,
    shrunk,
    link_swapped_in,
    link_to_the_same_bytes,
    pipe_swapped_in,
    removed,
)
FEW = pytest.mark.parametrize("swap", [renamed_over, changed_in_place, grown, link_swapped_in, removed])
swapped = pytest.mark.parametrize("swap", SWAPS, ids=lambda swap: swap.__name__)
TUNING = TuneSpec.model_validate(
    {"rank": 4, "max_steps": 2, "batch_size": 2, "compute": "fp32", "device": "cpu", "threads": 1}
)
MEASURED = EvalSpec.model_validate({"compute": "fp32", "device": "cpu", "threads": 1})
pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="pipes and links are a matter of POSIX"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def swap_all(folder: Path, swap: Swap) -> None:
    for file in sorted(folder.iterdir()):
        if file.name not in (MANIFEST, SIGNATURE):
            swap(file)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@swapped
@pytest.mark.parametrize(
    ("returned", "form"), [("lora", "adapter"), ("lora", "merged"), ("full", "merged"), ("bottleneck", "adapter")]
)
def test_plug_in_holds_what_was_verified(lab: Lab, swap: Swap, returned: str, form: str) -> None:
    spec = PlugInSpec.model_validate({"as": form, "again": True})
    base, owner = Base(lab.folder / "base"), lab.parties.owner
    honest = plug_in(base, offsite.intake(lab.folder / returned, owner), lab.folder / "honest", spec, owner)
    taken = offsite.intake(lab.folder / returned, owner)
    swap_all(lab.folder / returned, swap)
    plugged = plug_in(base, taken, lab.folder / "out", spec, owner)
    assert bytes_of(plugged.folder) == bytes_of(honest.folder)


@swapped
def test_an_earlier_checkpoint_is_what_was_verified(lab: Lab, swap: Swap) -> None:
    spec = PlugInSpec(checkpoint=2, again=True)
    base, owner = Base(lab.folder / "base"), lab.parties.owner
    honest = plug_in(base, offsite.intake(lab.folder / "checkpoints", owner), lab.folder / "honest", spec, owner)
    taken = offsite.intake(lab.folder / "checkpoints", owner)
    swap_all(lab.folder / "checkpoints", swap)
    assert bytes_of(plug_in(base, taken, lab.folder / "out", spec, owner).folder) == bytes_of(honest.folder)


@swapped
def test_a_classifier_is_what_was_verified(lab: Lab, swap: Swap) -> None:
    base, owner, spec = Base(lab.folder / "encoder"), lab.parties.owner, PlugInSpec(again=True)
    honest = plug_in(base, offsite.intake(lab.encoder_full, owner), lab.folder / "honest", spec, owner)
    taken = offsite.intake(lab.encoder_full, owner)
    swap_all(lab.encoder_full, swap)
    assert bytes_of(plug_in(base, taken, lab.folder / "out", spec, owner).folder) == bytes_of(honest.folder)


@FEW
@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_choosing_scores_what_was_verified(lab: Lab, swap: Swap, form: str) -> None:
    spec = PlugInSpec.model_validate({"as": form, "strength": 1.0, "again": True})
    base, owner, rows = Base(lab.folder / "base"), lab.parties.owner, tiny_rows(lab.folder / "rows.jsonl", 3)
    taken = offsite.intake(lab.folder / "checkpoints", owner)
    honest = choose(base, taken, rows, spec, MEASURED, owner)
    again = offsite.intake(lab.folder / "checkpoints", owner)
    swap_all(lab.folder / "checkpoints", swap)
    assert choose(base, again, rows, spec, MEASURED, owner) == honest
    assert np.isfinite([candidate.loss for candidate in honest.candidates]).all()


@swapped
def test_what_is_read_again_is_compared_again(lab: Lab, swap: Swap) -> None:
    """A return that was only verified holds no tensors: they are read when they are asked for."""
    looked_at = offsite.verify_return(lab.lora, lab.parties.owner, lab.parent())
    name = "adapter_model.safetensors"
    swap(lab.lora / name)
    with pytest.raises(VerificationError, match="changed after it was verified") as caught:
        looked_at.files.tensors(name)
    assert len(caught.value.reasons) == 1
    assert caught.value.next_step


@FEW
@pytest.mark.parametrize("kind", ["bundle", "declared-bundle", "mixture-bundle"])
def test_tuning_trains_what_was_verified(lab: Lab, swap: Swap, kind: str) -> None:
    rows, home = tiny_rows(lab.folder / "rows.jsonl", 4), lab.parties.data_owner
    honest = tune(verify_bundle(lab.folder / kind, home), rows, lab.folder / "honest", TUNING, home)
    bundle = verify_bundle(lab.folder / kind, home, hold=True)
    swap_all(lab.folder / kind, swap)
    assert bytes_of(tune(bundle, rows, lab.folder / "out", TUNING, home).folder) == bytes_of(honest.folder)


@FEW
def test_tuning_on_pictures_trains_what_was_verified(lab: Lab, swap: Swap) -> None:
    pictures, home = tiny_pictures(lab.folder / "pictures"), lab.parties.data_owner
    folder = lab.folder / "encoder-bundle"
    honest = tune(verify_bundle(folder, home), pictures, lab.folder / "honest", TUNING, home)
    bundle = verify_bundle(folder, home, hold=True)
    swap_all(folder, swap)
    assert bytes_of(tune(bundle, pictures, lab.folder / "out", TUNING, home).folder) == bytes_of(honest.folder)


@FEW
def test_tuning_refuses_weights_that_changed_before_they_were_read_again(lab: Lab, swap: Swap) -> None:
    """A bundle that was verified without being held; nothing trains, and nothing is left behind."""
    rows, home = tiny_rows(lab.folder / "rows.jsonl", 4), lab.parties.data_owner
    bundle = verify_bundle(lab.bundle, home)
    swap(lab.bundle / "model.safetensors")
    with pytest.raises(VerificationError, match="changed after it was verified"):
        tune(bundle, rows, lab.folder / "out", TUNING, home)
    assert not (lab.folder / "out").exists()


@FEW
def test_a_bundle_that_is_tuned_twice_is_compared_twice(lab: Lab, swap: Swap) -> None:
    """Its tensors went into the first model, and are read and hashed again for the second."""
    rows, home = tiny_rows(lab.folder / "rows.jsonl", 4), lab.parties.data_owner
    bundle = verify_bundle(lab.bundle, home, hold=True)
    first = tune(bundle, rows, lab.folder / "first", TUNING, home)
    assert bytes_of(tune(bundle, rows, lab.folder / "second", TUNING, home).folder) == bytes_of(first.folder)
    swap(lab.bundle / "model.safetensors")
    with pytest.raises(VerificationError, match="changed after it was verified"):
        tune(bundle, rows, lab.folder / "third", TUNING, home)


@FEW
@pytest.mark.parametrize("returned", ["lora", "full", "bottleneck", "head-lora"])
def test_scoring_scores_what_was_verified(lab: Lab, swap: Swap, returned: str) -> None:
    rows, home = tiny_rows(lab.folder / "rows.jsonl", 3), lab.parties.data_owner
    folders = [lab.folder / ("head-bundle" if returned == "head-lora" else "bundle"), lab.folder / returned]
    honest = evaluate(folders[0], rows, MEASURED, adapter=folders[1]).loss
    bundle, tuned = verify_bundle(folders[0], home, hold=True), offsite.verify_return(folders[1], home, hold=True)
    for folder in folders:
        swap_all(folder, swap)
    assert evaluate(bundle, rows, MEASURED, adapter=tuned).loss == honest


@FEW
def test_scoring_pictures_scores_what_was_verified(lab: Lab, swap: Swap) -> None:
    pictures, home = tiny_pictures(lab.folder / "pictures"), lab.parties.data_owner
    folder = lab.folder / "encoder-bundle"
    tune(verify_bundle(folder, home), pictures, lab.folder / "tuned", TUNING, home)
    honest = evaluate_images(folder, pictures, MEASURED, adapter=lab.folder / "tuned").loss
    bundle = verify_bundle(folder, home, hold=True)
    tuned = offsite.verify_return(lab.folder / "tuned", home, hold=True)
    for one in (folder, lab.folder / "tuned"):
        swap_all(one, swap)
    assert evaluate_images(bundle, pictures, MEASURED, adapter=tuned).loss == honest


def test_the_copy_that_libraries_read_is_nobody_elses_and_goes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    (lab.folder / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(lab.folder / "tmp"))
    bundle = verify_bundle(lab.bundle, lab.parties.data_owner)
    with pytest.raises(ZeroDivisionError), as_folder(bundle.files) as folder:
        assert folder.parent == lab.folder / "tmp"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {file.name for file in folder.iterdir()} >= {"config.json", "tokenizer.json"}
        assert not list(folder.glob("*.safetensors"))
        _ = 1 / 0
    assert list((lab.folder / "tmp").iterdir()) == []


def test_a_base_that_changes_meanwhile(lab: Lab) -> None:
    """It is the owner's own, so this is an accident; a plug-in of half of each would be the worst of both."""
    base, owner, spec = Base(lab.folder / "base"), lab.parties.owner, PlugInSpec()
    taken = offsite.intake(lab.full, owner)

    def meanwhile(event: offsite.Event) -> None:
        if event.stage == "writing the plug-in":
            edit_weights(
                lab.folder / "base" / "model.safetensors", lambda weights: weights["model.norm.weight"].fill(2)
            )

    with pytest.raises(offsite.IncompatibleError, match="changed while it was read") as caught:
        plug_in(base, taken, lab.folder / "out", spec, owner, meanwhile)
    assert caught.value.reasons == ("model.safetensors was written to",)
    assert not (lab.folder / "out").exists()
    with pytest.raises(offsite.IncompatibleError, match="is not the base"):  # what was known of it no longer holds
        open_base_of(taken, base, spec, owner, silent)


def test_a_base_that_stays_is_fingerprinted_once(lab: Lab) -> None:
    base, owner, spec = Base(lab.folder / "base"), lab.parties.owner, PlugInSpec()
    taken = offsite.intake(lab.full, owner)
    model, _ = open_base_of(taken, base, spec, owner, silent)
    assert list(base.fingerprints.values()) == [lab.parent().base]
    base.fingerprints.update(dict.fromkeys(base.fingerprints, "0" * 64))
    with pytest.raises(offsite.IncompatibleError, match="is not the base"):
        open_base_of(taken, base, spec, owner, silent)
    require_unchanged(model)
