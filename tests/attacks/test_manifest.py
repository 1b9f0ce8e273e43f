"""What a manifest may not say, each refused before any rule runs; signed by the rightful party all the same."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from artifacts import manifest_of, sign_again
from attacks.lab import Lab
from offsite.errors import VerificationError
from offsite.protocol import manifest as module
from offsite.protocol.manifest import (
    MANIFEST,
    MANIFEST_BYTES,
    SIGNATURE,
    ManifestProblem,
    Split,
    parse_manifest,
)
from offsite.protocol.verify import verify

Json = dict[str, Any]


def setting(*path: str, value: Any) -> Callable[[Json], None]:
    def change(manifest: Json) -> None:
        for key in path[:-1]:
            manifest = manifest[int(key)] if isinstance(manifest, list) else manifest[key]
        manifest[path[-1]] = value

    return change


def without(key: str) -> Callable[[Json], None]:
    return lambda manifest: manifest.pop(key) and None


T = "model.layers.0.mlp.up_proj.weight"
L = "model.layers.0.mlp.up_proj"
ENTRY = {"shape": [48, 32], "dtype": "F32"}
BUNDLE: dict[str, tuple[Callable[[Json], None], str]] = {
    "unknown key": (setting("auto_map", value="x.Y"), "auto_map: Extra inputs are not permitted"),
    "unknown key in a part": (setting("split", "drop", value=1), "split.drop: Extra inputs"),
    "unknown key of a file": (setting("files", "0", "url", value="x"), "url: Extra inputs"),
    "unknown key of a tensor": (setting("tensors", T, value=ENTRY | {"x": 1}), "Extra inputs"),
    "unknown requirement": (setting("requires", value=["low-rank"]), "requires low-rank, which this version does not"),
    "requirement that is no word": (setting("requires", value=["\x1b[2J"]), "requires.0: String should match pattern"),
    "too many requirements": (setting("requires", value=["a"] * 65), "requires: Tuple should have at most 64"),
    "future format": (setting("format", value=2), "has format 2, this version reads up to 1: update offsite"),
    "past format": (setting("format", value=0), "format: Input should be"),
    "format as text": (setting("format", value="1"), "format: Input should be"),
    "format as truth": (setting("format", value=True), "format: Input should be"),
    "unknown kind": (setting("kind", value="model"), "does not match any of the expected tags"),
    "no kind": (without("kind"), "Unable to extract tag"),
    "no signer": (without("issuer"), "issuer: Field required"),
    "no files": (without("files"), "files: Field required"),
    "an embedding as the head": (
        setting("head", value={"model.embed_tokens.weight": ENTRY}),
        "model.embed_tokens.weight is no part of the head of llama, so it may not come back",
    ),
    "more keys than any manifest": (
        lambda m: m.update((f"key_{number}", 0) for number in range(100)),
        "more entries, or more of them in one place",
    ),
    "more entries than any manifest": (
        setting("methods", value=[0] * 600_000),
        "more entries, or more of them in one place",
    ),
    "tensor entry of many keys": (
        lambda m: m["tensors"][T].update((f"key_{number}", 0) for number in range(100)),
        "more entries, or more of them in one place",
    ),
    "number that no library prints": (setting("max_rank", value=10**60), "has 61 digits"),
    "file listed twice": (
        lambda m: m["files"].append(m["files"][0]),
        "a file is listed twice",
    ),
    "file listed twice but for its case": (
        lambda m: m["files"].append(m["files"][0] | {"name": m["files"][0]["name"].upper()}),
        "a file is listed twice",
    ),
    "file outside": (setting("files", "0", "name", value="../config.json"), "name: String should match pattern"),
    "hidden file": (setting("files", "0", "name", value=".config"), "name: String should match pattern"),
    "file in a sub-folder": (setting("files", "0", "name", value="a/b"), "name: String should match pattern"),
    "file of another system": (setting("files", "0", "name", value="a\\b"), "name: String should match pattern"),
    "file name with a line end": (setting("files", "0", "name", value="a\n"), "name: String should match pattern"),
    "file name with a zero": (setting("files", "0", "name", value="a\0"), "name: String should match pattern"),
    "negative size": (setting("files", "0", "size", value=-1), "size: Input should be greater"),
    "size as text": (setting("files", "0", "size", value="12"), "size: Input should be a valid integer"),
    "size as truth": (setting("files", "0", "size", value=True), "size: Input should be a valid integer"),
    "digest in capitals": (setting("files", "0", "sha256", value="A" * 64), "sha256: String should match"),
    "short digest": (setting("base", value="0" * 63), "base: String should match"),
    "recipient is no key": (setting("recipient", value="hospital"), "recipient: String should match"),
    "time with a zone": (setting("issued_at", value="2026-01-01T00:00:00+01:00"), "issued_at: String should match"),
    "unknown architecture": (setting("architecture", value="evil"), "architecture 'evil' is not known"),
    "unknown method": (setting("methods", value=["dora"]), "methods.0: Input should be"),
    "no method": (setting("methods", value=[]), "methods: Tuple should have at least 1"),
    "no rank": (setting("max_rank", value=0), "max_rank: Input should be greater"),
    "endless rank": (setting("max_rank", value=10**9), "max_rank: Input should be less"),
    "negative split": (setting("split", "bottom", value=-1), "split.bottom: Input should be greater"),
    "endless split": (setting("split", "emulator", value=10**9), "split.emulator: Input should be less"),
    "nothing comes back": (setting("tensors", value={}), "tensors and lora_targets list nothing"),
    "whole blocks of compressed ones": (
        setting("split", "adapted", value=[1]),
        "of which only biases may come back, and no whole block",
    ),
    "an adapted block that is as in the base": (
        setting("split", "adapted", value=[0]),
        "adapted lists blocks that are not compressed blocks of the emulator",
    ),
    "an adapted block that is not there": (
        setting("split", "adapted", value=[9]),
        "adapted lists blocks that are not compressed blocks of the emulator",
    ),
    "an adapted block twice": (setting("split", "adapted", value=[1, 1]), "adapted is not in ascending order"),
    "tensor name with a slash": (setting("tensors", "a/b", value=ENTRY), "should match pattern"),
    "tensor of ints": (setting("tensors", T, value=ENTRY | {"dtype": "I32"}), "Input should be 'F32', 'BF16' or 'F16'"),
    "nine dimensions": (setting("tensors", T, value=ENTRY | {"shape": [1] * 9}), "at most 8 items"),
    "negative dimension": (setting("tensors", T, value=ENTRY | {"shape": [-1]}), "should be greater"),
    "fractional dimension": (setting("tensors", T, value=ENTRY | {"shape": [1.5]}), "valid integer"),
    "frozen tensor": (
        setting("tensors", "model.layers.1.mlp.up_proj.weight", value=ENTRY),
        "model.layers.1.mlp.up_proj.weight belongs to no trained block",
    ),
    "embedding": (
        setting("tensors", "model.embed_tokens.weight", value=ENTRY),
        "model.embed_tokens.weight belongs to no trained block",
    ),
    "LoRA on a frozen block": (
        setting("lora_targets", "model.layers.1.mlp.up_proj", value=[32, 48]),
        "model.layers.1.mlp.up_proj belongs to no trained block",
    ),
    "LoRA on a norm": (
        setting("lora_targets", "model.layers.0.input_layernorm", value=[32, 32]),
        "LoRA targets that are not linear layers of llama",
    ),
    "LoRA on a whole block": (
        setting("lora_targets", "model.layers.0", value=[32, 32]),
        "model.layers.0 belongs to no trained block",
    ),
    "LoRA target of three sizes": (setting("lora_targets", L, value=[1, 2, 3]), "at most 2 items"),
}
RETURN: dict[str, tuple[Callable[[Json], None], str]] = {
    "unknown key": (setting("rows", value=12), "rows: Extra inputs are not permitted"),
    "loss told": (setting("lora", "loss", value=1.5), "lora.loss: Extra inputs"),
    "requirement of a bundle": (
        setting("requires", value=["share"]),
        "requires features that only a bundle can require",
    ),
    "unknown requirement": (setting("requires", value=["dp"]), "requires dp, which this version does not know"),
    "future format": (setting("format", value=7), "has format 7"),
    "lora settings with a full tuning": (
        setting("method", value="full"),
        "lora settings are required by method 'lora'",
    ),
    "a bottleneck beside a LoRA": (
        setting("bottleneck", value={"width": 4}),
        "bottleneck settings are required by method",
    ),
    "a head beside bottlenecks": (
        lambda m: m.update(head=True, method="bottleneck", lora=None, bottleneck={"width": 4}),
        "a head is permitted only with the methods",
    ),
    "lora tuning without settings": (setting("lora", value=None), "lora settings are required by method 'lora'"),
    "no rank": (setting("lora", "rank", value=0), "lora.rank: Input should be greater"),
    "no scale": (setting("lora", "alpha", value=0.0), "lora.alpha: Input should be greater"),
    "endless scale": (setting("lora", "alpha", value=1e300), "lora.alpha: Input should be less"),
    "no targets": (setting("lora", "targets", value=[]), "lora.targets: Tuple should have at least 1"),
    "target with a star": (setting("lora", "targets", value=["model.*"]), "lora.targets.0: String should match"),
    "parent is no digest": (setting("bundle", value="x"), "bundle: String should match"),
    "fewer checkpoints than none": (setting("earlier_checkpoints", value=-1), "earlier_checkpoints: Input should be"),
    "endless checkpoints": (setting("earlier_checkpoints", value=100), "earlier_checkpoints: Input should be less"),
    "checkpoints as truth": (
        setting("earlier_checkpoints", value=True),
        "earlier_checkpoints: Input should be a valid",
    ),
    "checkpoints as text": (setting("earlier_checkpoints", value="1"), "earlier_checkpoints: Input should be a valid"),
    "scores of other checkpoints": (setting("scores", value=[1.0, 2.0]), "2 scores of 1 checkpoints"),
    "no scores": (setting("scores", value=[]), "scores: Tuple should have at least 1"),
    "negative score": (setting("scores", value=[-0.5]), "scores.0: Input should be greater"),
    "score as text": (setting("scores", value=["1.5"]), "scores.0: Input should be a valid number"),
    "score that tells more": (setting("scores", value=[{"rows": 12}]), "scores.0: Input should be a valid number"),
    "nothing in it": (setting("tensors", value={}), "tensors: Dictionary should have at least 1"),
}


def check(lab: Lab, target: str, change: Callable[[Json], None], says: str) -> None:
    folder = lab.folder / target
    identity = lab.owner if target == "bundle" else lab.data_owner
    manifest = manifest_of(folder)
    change(manifest)
    raw = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(raw)
    (folder / SIGNATURE).write_bytes(identity.sign("bundle" if target == "bundle" else "return", raw))
    home = lab.parties.data_owner if target == "bundle" else lab.parties.owner
    with pytest.raises(VerificationError) as caught:
        verify(folder, home)
    assert any(says in reason for reason in caught.value.reasons), caught.value.reasons
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("case", BUNDLE)
def test_bundle(lab: Lab, case: str) -> None:
    check(lab, "bundle", *BUNDLE[case])


@pytest.mark.parametrize("case", RETURN)
def test_return(lab: Lab, case: str) -> None:
    check(lab, "lora", *RETURN[case])


def test_plug_in_with_an_unknown_key(lab: Lab) -> None:
    sign_again(lab.folder / "plugged", lab.owner, secret="x")
    with pytest.raises(VerificationError, match="secret: Extra inputs"):
        verify(lab.folder / "plugged", lab.parties.owner)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'\xef\xbb\xbf{"kind": "bundle"}', "is not JSON"),
        (b'{"kind": "bundle", "kind": "return"}', "a key appears twice"),
        (b'{"kind": NaN}', "NaN is not JSON"),
        (b'{"kind": 1e999}', "out of range"),
        (b"[" * 200_000, "is not JSON"),
        (b"9" * 10_000, "is not JSON"),
        (b"[]", "Input should be"),
        (b"null", "Input should be"),
        (b'"bundle"', "Input should be"),
        (b'{"kind": ["bundle"]}', "tag"),
        (rb'{"kind": "bundle", "\ud800": 1}', "unable to parse raw data as a unicode string"),
    ],
)
def test_bytes_that_are_no_manifest(raw: bytes, says: str) -> None:
    with pytest.raises(ManifestProblem) as caught:
        parse_manifest(raw)
    assert caught.value.reasons
    assert any(says in reason for reason in caught.value.reasons), caught.value.reasons
    assert all(reason.isprintable() for reason in caught.value.reasons)


def test_manifest_over_the_limit(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ManifestProblem, match=f"expected at most {MANIFEST_BYTES}"):
        parse_manifest(b" " * (MANIFEST_BYTES + 1))
    with (lab.bundle / MANIFEST).open("ab") as file:
        file.write(b" " * MANIFEST_BYTES)
    with pytest.raises(VerificationError, match="expected at most"):
        verify(lab.bundle, lab.parties.data_owner)


def test_terminal_codes_are_not_passed_on(lab: Lab) -> None:
    manifest = manifest_of(lab.bundle) | {"\x1b[2J": "\x1b[2J", "architecture": "\x1b[2J\n"}
    with pytest.raises(ManifestProblem) as caught:
        parse_manifest(json.dumps(manifest).encode())
    assert all(reason.isprintable() for reason in caught.value.reasons), caught.value.reasons


def test_only_features_that_this_version_can_build_are_known() -> None:
    built = {"share", "quantise", "svd", "mlp-width", "sparse", "affine", "heads", "neurons", "experts"}
    assert frozenset(built | {"spread", "adapted", "family"}) == module.KNOWN_REQUIREMENTS


def test_a_split_of_thousands_of_blocks_is_looked_through_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a manifest of a megabyte would take half a minute: names times blocks."""
    asked = []
    trained = Split.trained.fget
    assert trained is not None
    monkeypatch.setattr(Split, "trained", property(lambda self: asked.append(1) or trained(self)))
    manifest = manifest_of(lab.bundle)
    assert len(manifest["tensors"]) > 10
    parse_manifest(json.dumps(manifest).encode())
    assert len(asked) == 1
