import json
from pathlib import Path

import pytest

from offsite.protocol.home import Home
from offsite.protocol.manifest import (
    MANIFEST,
    SIGNATURE,
    BundleManifest,
    LoraSettings,
    ManifestProblem,
    ReturnManifest,
    Split,
    TensorEntry,
    parse_manifest,
    render_manifest,
)
from offsite.protocol.sealing import file_entries, seal
from offsite.storage.files import Written


def bundle(**changes: object) -> BundleManifest:
    fields: dict[str, object] = {
        "kind": "bundle", "format": 1, "requires": [], "files": [], "issued_at": "2026-01-01T00:00:00Z",
        "issuer": "0" * 64, "recipient": "1" * 64, "base": "2" * 64, "tokenizer": "3" * 64, "architecture": "llama",
        "split": {"bottom": 1, "emulator": 2, "top": 1}, "methods": ["lora"], "max_rank": 8, "max_width": 8,
        "tensors": {"model.layers.3.mlp.up_proj.weight": {"shape": [4, 8], "dtype": "BF16"}},
        "lora_targets": {"model.layers.0.mlp.up_proj": [8, 4]},
    }  # fmt: skip
    return BundleManifest.model_validate({**fields, **changes})


def test_round_trip() -> None:
    manifest = bundle()
    assert parse_manifest(render_manifest(manifest)) == manifest
    assert render_manifest(manifest).endswith(b"}\n")


def test_split() -> None:
    split = Split(bottom=2, emulator=3, top=1)
    assert (split.blocks, split.trained) == (6, (0, 1, 5))
    assert Split(bottom=0, emulator=1, top=2).trained == (1, 2)
    assert Split(bottom=2, emulator=0, top=0).trained == (0, 1)
    spread = Split(bottom=1, emulator=5, top=0, spread=(2, 4))
    assert (spread.blocks, spread.trained, spread.features) == (6, (0, 2, 4), ("spread",))


def test_a_split_without_spread_does_not_mention_it() -> None:
    assert json.loads(render_manifest(bundle()))["split"] == {"bottom": 1, "emulator": 2, "top": 1}


@pytest.mark.parametrize(
    ("spread", "says"),
    [
        ([1], "not inside the emulator"),  # touches bottom
        ([4], "not inside the emulator"),  # touches top
        ([0, 2], "not inside the emulator"),
        ([2, 9], "not inside the emulator"),
        ([-1], "not inside the emulator"),
        ([2**70], "not inside the emulator"),
        ([3, 2], "not in ascending order"),
        ([2, 2], "not in ascending order"),
        ([2.0], "int"),
        ([True], "int"),
        ("2", "tuple"),
    ],
)
def test_what_spread_must_be(spread: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Split.model_validate({"bottom": 1, "emulator": 4, "top": 1, "spread": spread})


def test_manifests_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        bundle().max_rank = 9  # type: ignore[misc]


def test_every_problem_is_named_with_its_place() -> None:
    content = json.loads(render_manifest(bundle()))
    content |= {"base": "x", "max_rank": 0, "evil": 1}
    content["split"]["bottom"] = -1
    with pytest.raises(ManifestProblem) as caught:
        parse_manifest(json.dumps(content).encode())
    places = {reason.split(": ")[1] for reason in caught.value.reasons}
    assert places == {"base", "max_rank", "evil", "split.bottom"}
    assert all(reason.startswith("offsite.json: ") for reason in caught.value.reasons)


def test_return_without_anything_about_the_data() -> None:
    """But for the scores, which are null unless the data owner asks to tell them."""
    fields = set(ReturnManifest.model_fields)
    assert ReturnManifest.model_fields["scores"].default is None
    assert fields == {
        "kind", "format", "requires", "files", "bundle", "signer", "recipient", "method", "lora",
        "bottleneck", "head", "earlier_checkpoints", "scores", "tensors", "classes",
    }  # fmt: skip
    assert set(LoraSettings.model_fields) == {"rank", "alpha", "targets"}


def test_tensor_entries_compare_by_value() -> None:
    assert TensorEntry(shape=(2, 3), dtype="F32") == TensorEntry.model_validate({"shape": [2, 3], "dtype": "F32"})


def test_seal(tmp_path: Path) -> None:
    identity = Home(tmp_path / "home").create_identity("acme")
    folder = tmp_path / "out"
    folder.mkdir()
    entries = file_entries([Written("b", 2, "1" * 64), Written("a", 1, "0" * 64)])
    assert [entry.name for entry in entries] == ["a", "b"]
    manifest = bundle(files=[entry.model_dump() for entry in entries])
    digest = seal(folder, manifest, identity, tmp_path / "out").digest
    raw = (folder / MANIFEST).read_bytes()
    assert parse_manifest(raw) == manifest
    assert identity.public_key.verifies((folder / SIGNATURE).read_bytes(), "bundle", raw)
    assert len(digest) == 64


def test_what_the_other_party_would_refuse_is_not_sealed(tmp_path: Path) -> None:
    identity = Home(tmp_path / "home").create_identity("acme")
    with pytest.raises(ManifestProblem):
        seal(tmp_path, bundle().model_copy(update={"base": "x"}), identity, tmp_path)
    assert not (tmp_path / MANIFEST).exists()
