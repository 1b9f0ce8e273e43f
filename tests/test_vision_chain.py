"""The whole protocol for image encoders, in every form of every row; what comes out is what transformers runs."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification, pipeline

import offsite
from artifacts import full_return, packed
from offsite import Base, EvalSpec, PackSpec, PlugInSpec, TuneSpec
from offsite.data.pictures.picture_files import load_processor
from offsite.data.pictures.picture_sets import read_pictures
from offsite.data.pictures.prepared_pictures import Pictures
from offsite.errors import UsageError
from offsite.evaluation.image_scores import evaluate_images
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.loading import load_model
from offsite.models.model_folder import model_settings
from offsite.protocol.contents import CLASSIFIER, PROCESSOR
from offsite.protocol.manifest import MANIFEST
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_float32, read_header
from tiny import EVERY_VISION_KIND, VISION_KINDS, tiny_parties, tiny_pictures, tiny_vision_base

CPU = torch.device("cpu")
EXACT = EvalSpec(compute="fp32", device="cpu", threads=1)
HAS_CLASSIFIER = [kind for kind, form in VISION_KINDS.items() if not ARCHITECTURES[form["family"]].vision.tower_of]


def tuning(method: Literal["lora", "full"], **settings: Any) -> TuneSpec:
    usual = {"method": method, "rank": 4, "lr": 3e-3, "max_steps": 6, "batch_size": 6, "micro_batch_tokens": 64}
    return TuneSpec.model_validate({**usual, "compute": "fp32", "device": "cpu", "threads": 1, **settings})


def states(folder: Path, **keywords: Any) -> torch.Tensor:
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16).sin()
    model = AutoModel.from_pretrained(folder, **keywords).eval()
    with torch.no_grad():
        found: torch.Tensor = model(pixel_values=pixels).last_hidden_state
    return found


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
def test_with_all_blocks_the_bundle_is_the_base(tmp_path: Path, kind: str) -> None:
    base = tiny_vision_base(tmp_path / "base", kind, 4, classifier=kind in HAS_CLASSIFIER)
    bundle = packed(base, tmp_path / "bundle", tiny_parties(tmp_path))
    assert torch.equal(states(bundle.folder), states(base))
    for file in bundle.folder.iterdir():
        assert b"SECRET" not in file.read_bytes()
        assert b"classifier.weight" not in file.read_bytes()
    assert "id2label" not in json.loads((bundle.folder / "config.json").read_text())


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
def test_with_blocks_dropped_it_is_a_truncated_base(tmp_path: Path, kind: str) -> None:
    base = tiny_vision_base(tmp_path / "base", kind, 5)
    bundle = packed(base, tmp_path / "bundle", tiny_parties(tmp_path), keep=1)
    family = ARCHITECTURES[VISION_KINDS[kind]["family"]]
    model = load_model(base, dtype=torch.float32, device=CPU)
    blocks = model.get_submodule(family.module_blocks or family.blocks)
    for index in (3, 2):
        del blocks[index]
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16).sin()
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state
    assert torch.equal(states(bundle.folder), expected)


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_nothing_compressed_means_nothing_lost(tmp_path: Path, kind: str, method: Literal["lora", "full"]) -> None:
    """The data owner's tuned bundle and the plug-in, which transformers loads and runs by itself, tell alike."""
    parties = tiny_parties(tmp_path)
    base = Base(tiny_vision_base(tmp_path / "base", kind, 4, classifier=kind in HAS_CLASSIFIER))
    pictures = tiny_pictures(tmp_path / "pictures")
    spec = PackSpec(bottom=1, top=1, keep=2, heal="none", dtype="fp32", max_rank=4)
    bundle = offsite.pack(base, tmp_path / "bundle", "hospital", spec, parties.owner)
    returned = offsite.tune(bundle, pictures, tmp_path / "return", tuning(method), parties.data_owner)
    assert returned.manifest.classes == ("blue", "green", "red")
    made = offsite.plug_in(
        base, offsite.intake(returned.folder, parties.owner), tmp_path / "plugged", PlugInSpec(), parties.owner
    )
    assert made.manifest.form == "merged"
    own = evaluate_images(tmp_path / "bundle", pictures, EXACT, adapter=returned.folder)
    plugged = evaluate_images(made.folder, pictures, EXACT)
    assert plugged.loss == pytest.approx(own.loss, abs=1e-5)
    assert plugged.accuracy == own.accuracy
    assert plugged.loss < np.log(3) - 0.01  # less than a head that knows nothing

    model, info = AutoModelForImageClassification.from_pretrained(made.folder, output_loading_info=True)
    assert type(model).__name__ == ARCHITECTURES[VISION_KINDS[kind]["family"]].vision.class_name
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}


def test_a_list_of_blocks(tmp_path: Path) -> None:
    """Blocks between frozen ones train too, and nothing is lost where nothing is compressed."""
    parties = tiny_parties(tmp_path)
    base = Base(tiny_vision_base(tmp_path / "base", "dinov2", 5))
    pictures = tiny_pictures(tmp_path / "pictures")
    spec = PackSpec(train=(0, 2, 4), keep=2, heal="none", dtype="fp32")
    bundle = offsite.pack(base, tmp_path / "bundle", "hospital", spec, parties.owner)
    assert bundle.manifest.split.trained == (0, 2, 4)
    returned = offsite.tune(bundle, pictures, tmp_path / "return", tuning("full"), parties.data_owner)
    made = offsite.plug_in(
        base, offsite.intake(returned.folder, parties.owner), tmp_path / "plugged", PlugInSpec(), parties.owner
    )
    own = evaluate_images(bundle.folder, pictures, EXACT, adapter=returned.folder)
    assert evaluate_images(made.folder, pictures, EXACT).loss == pytest.approx(own.loss, abs=1e-5)


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
def test_adapters_on_compressed_blocks(tmp_path: Path, kind: str) -> None:
    """Every block is pruned and carries a LoRA pair; the plug-in has the pair's product in every block of the base."""
    parties = tiny_parties(tmp_path)
    base = Base(tiny_vision_base(tmp_path / "base", kind, 3))
    pictures = tiny_pictures(tmp_path / "pictures")
    settings = {"placement": "every", "prune": 0.5, "prune_by": "magnitude", "heal": "none", "dtype": "fp32"}
    spec = PackSpec.model_validate({**settings, "max_rank": 4})
    bundle = offsite.pack(base, tmp_path / "bundle", "hospital", spec, parties.owner)
    assert (bundle.manifest.split.verbatim, bundle.manifest.split.adapted) == ((), (0, 1, 2))
    assert not {"full", "bottleneck"} & set(bundle.manifest.methods)
    returned = offsite.tune(bundle, pictures, tmp_path / "return", tuning("lora"), parties.data_owner)
    made = offsite.plug_in(
        base, offsite.intake(returned.folder, parties.owner), tmp_path / "plugged", PlugInSpec(), parties.owner
    )
    own = evaluate_images(bundle.folder, pictures, EXACT, adapter=returned.folder)
    assert own.loss < np.log(3)
    family, lora = bundle.manifest.family, returned.manifest.lora
    assert lora is not None
    before, after = open_checkpoint(base.folder).tensors, open_checkpoint(made.folder).tensors
    sent = read_header(returned.folder / "adapter_model.safetensors")
    assert {place[0] for target in lora.targets if (place := family.linear_layer_of(target))} == {0, 1, 2}
    for target in lora.targets:
        place = family.linear_layer_of(target)
        assert place is not None
        name = f"{family.in_block(*place)}.weight"
        a, b = (read_float32(sent[f"base_model.model.{target}.lora_{half}.weight"]) for half in "AB")
        [merged] = [tensor for full, tensor in after.items() if full.endswith(f".{name}")]
        change = read_float32(merged) - read_float32(before[name])
        assert np.allclose(change, lora.alpha / lora.rank * (b @ a), atol=1e-6), name


def test_a_pipeline_of_transformers_runs_the_plug_in(tmp_path: Path) -> None:
    parties = tiny_parties(tmp_path)
    base = Base(tiny_vision_base(tmp_path / "base", "dinov2", 4))
    pictures = tiny_pictures(tmp_path / "pictures")
    bundle = packed(base.folder, tmp_path / "bundle", parties)
    spec = tuning("full", max_steps=30, lr=1e-3, augment=False)
    returned = offsite.tune(bundle, pictures, tmp_path / "return", spec, parties.data_owner)
    made = offsite.plug_in(
        base, offsite.intake(returned.folder, parties.owner), tmp_path / "plugged", PlugInSpec(), parties.owner
    )
    assert evaluate_images(made.folder, pictures, EXACT).accuracy == 1.0
    run = pipeline("image-classification", model=str(made.folder), device="cpu")
    for name in ("blue", "green", "red"):
        assert run(Image.open(pictures / name / "0.png"))[0]["label"] == name


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
def test_an_untouched_return_gives_the_base_back(tmp_path: Path, kind: str) -> None:
    """Bit for bit, in bf16: what the plug-in's encoder computes is what the base computes."""
    parties = tiny_parties(tmp_path)
    base = tiny_vision_base(tmp_path / "base", kind, 4, dtype="bf16")
    bundle = packed(base, tmp_path / "bundle", parties, keep=1, dtype="bf16")
    returned = full_return(bundle, tmp_path / "return", parties.data_owner, classes=("one", "two"))
    made = offsite.plug_in(
        Base(base), offsite.intake(returned.folder, parties.owner), tmp_path / "plugged", PlugInSpec(), parties.owner
    )
    whole = AutoModelForImageClassification.from_pretrained(made.folder, dtype=torch.bfloat16).eval()
    family = ARCHITECTURES[VISION_KINDS[kind]["family"]]
    encoder = load_model(base, dtype=torch.bfloat16, device=CPU)
    own = {family.name_of(name): parameter for name, parameter in whole.named_parameters() if family.name_of(name)}
    parameters = {family.name_of(name): parameter for name, parameter in encoder.named_parameters()}
    assert own.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert torch.equal(own[name], parameter), name


def test_a_return_tells_the_names_of_classes_and_nothing_else(tmp_path: Path) -> None:
    parties = tiny_parties(tmp_path)
    base = tiny_vision_base(tmp_path / "base")
    pictures = tiny_pictures(tmp_path / "SECRET-pictures")
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = offsite.tune(bundle, pictures, tmp_path / "return", tuning("lora"), parties.data_owner)
    assert {file.name for file in (tmp_path / "return").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", CLASSIFIER, MANIFEST, f"{MANIFEST}.sig",
    }  # fmt: skip
    for file in (tmp_path / "return").iterdir():
        for word in (b"SECRET", b"hospital", b".png", str(tmp_path).encode()):
            assert word not in file.read_bytes()
    taken = offsite.intake(returned.folder, parties.owner)
    with pytest.raises(UsageError, match="complete checkpoint"):
        offsite.plug_in(Base(base), taken, tmp_path / "adapter", PlugInSpec(as_="adapter"), parties.owner)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, stop: int) -> None:
    """Augmentation, order and the head's state included: bit for bit."""
    parties = tiny_parties(tmp_path)
    bundle = packed(tiny_vision_base(tmp_path / "base"), tmp_path / "bundle", parties)
    pictures = tiny_pictures(tmp_path / "pictures")
    spec = tuning("lora", save_every=1)
    whole = offsite.tune(bundle, pictures, tmp_path / "whole", spec, parties.data_owner)

    def interrupt(event: Any) -> None:
        if event.stage == "tuning" and event.done == stop:
            raise KeyboardInterrupt

    arguments = (bundle, pictures, tmp_path / "cut", spec, parties.data_owner)
    with pytest.raises(KeyboardInterrupt):
        offsite.tune(*arguments, progress=interrupt)
    cut = offsite.tune(*arguments, resume=True)
    for name in ("adapter_model.safetensors", CLASSIFIER):
        assert (whole.folder / name).read_bytes() == (cut.folder / name).read_bytes()


@pytest.mark.parametrize(("pooling", "zeros"), [("class", slice(32, 64)), ("mean", slice(0, 32)), ("both", None)])
def test_pooling(tmp_path: Path, pooling: str, zeros: slice | None) -> None:
    """A part that is not read has zeros for weights, so that transformers' own classifier still fits."""
    from safetensors.torch import load_file

    parties = tiny_parties(tmp_path)
    bundle = packed(tiny_vision_base(tmp_path / "base", "dinov2"), tmp_path / "bundle", parties)
    pictures = tiny_pictures(tmp_path / "pictures", 2)
    spec = tuning("full", max_steps=2, pooling=pooling, weight_decay=0.1)
    offsite.tune(bundle, pictures, tmp_path / "return", spec, parties.data_owner)
    weight = load_file(tmp_path / "return" / CLASSIFIER)["classifier.weight"]
    assert weight.shape == (3, 64)
    assert (weight == 0).sum() == (0 if zeros is None else 3 * 32)
    if zeros is not None:
        assert bool((weight[:, zeros] == 0).all())


def test_pooling_that_the_classifier_cannot_read(tmp_path: Path) -> None:
    parties = tiny_parties(tmp_path)
    bundle = packed(tiny_vision_base(tmp_path / "base", "vit"), tmp_path / "bundle", parties)
    pictures = tiny_pictures(tmp_path / "pictures", 2)
    with pytest.raises(UsageError, match="cannot read pooling 'mean'"):
        offsite.tune(bundle, pictures, tmp_path / "return", tuning("lora", pooling="mean"), parties.data_owner)


def test_the_features_are_what_transformers_classifier_reads(tmp_path: Path) -> None:
    base = tiny_vision_base(tmp_path / "base", "vit", classifier=True)
    pictures = tiny_pictures(tmp_path / "pictures", 1)
    assert model_settings(base)["architectures"] == ["ViTForImageClassification"]
    batch = Pictures(read_pictures(pictures), load_processor(base)).batch([0, 1])
    assert batch.shape == (2, 3, 16, 16)
    assert (base / PROCESSOR).is_file()
