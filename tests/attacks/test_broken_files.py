"""Files that are broken on purpose: several rules trip over each, and verification says so instead of falling over."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import edit_json, edit_weights, manifest_of, raw_safetensors, sign_again
from attacks.lab import Lab
from offsite.errors import OffsiteError, StorageError, UsageError, VerificationError
from offsite.models.modules.declared import Declared, wrapped
from offsite.protocol.contents import ADAPTER_WEIGHTS
from offsite.protocol.home import Home, Role
from offsite.protocol.manifest import MANIFEST, SIGNATURE
from offsite.protocol.verify import verify, verify_bundle, verify_plug_in, verify_return
from offsite.storage import safetensors_files
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_header


def refused(lab: Lab, target: str, says: str) -> None:
    with pytest.raises(VerificationError) as caught:
        lab.check(target)
    assert any(says in reason for reason in caught.value.reasons), caught.value.reasons


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS: dict[str, tuple[object, bytes, str]] = {
    "truncated data": ({"a": F32}, b"\0" * 3, "truncated or padded"),
    "data after the last tensor": ({"a": F32}, b"\0" * 5, "truncated or padded"),
    "overlap": ({"a": F32, "b": F32}, b"\0" * 4, "overlap or hole"),
    "hole": ({"a": F32, "b": F32 | {"data_offsets": [8, 12]}}, b"\0" * 12, "overlap or hole"),
    "partial overlap": ({"a": F32, "b": F32 | {"data_offsets": [2, 6]}}, b"\0" * 6, "overlap or hole"),
    "range is not the shape's": ({"a": F32 | {"shape": [2]}}, b"\0" * 4, "its shape and dtype need 8"),
    "end before begin": ({"a": F32 | {"data_offsets": [4, 0]}}, b"\0" * 4, "its shape and dtype need"),
    "key twice": (b'{"a": 1, "a": 2}', b"", "a key appears twice"),
    "no JSON": (b"{]", b"", "header is not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "header is not JSON"),
    "NaN": (b'{"a": NaN}', b"", "NaN is not JSON"),
    "infinite number": (b'{"a": 1e999}', b"", "out of range"),
    "nested without end": (b"[" * 100_000, b"", "header is not JSON"),
    "list": ([], b"", "not a JSON object"),
    "entry is no object": ({"a": 1}, b"", "exactly dtype, shape and data_offsets"),
    "entry with more": ({"a": F32 | {"code": "x"}}, b"\0" * 4, "exactly dtype, shape and data_offsets"),
    "unknown dtype": ({"a": F32 | {"dtype": "F8"}}, b"\0" * 4, "is not one of"),
    "dtype is a list": ({"a": F32 | {"dtype": ["F32"]}}, b"\0" * 4, "is not one of"),
    "shape is no list": ({"a": F32 | {"shape": 1}}, b"\0" * 4, "shape is malformed"),
    "nine dimensions": ({"a": F32 | {"shape": [1] * 9}}, b"\0" * 4, "shape is malformed"),
    "negative size": ({"a": F32 | {"shape": [-1]}}, b"\0" * 4, "holds what is no size"),
    "truth as a size": ({"a": F32 | {"shape": [True]}}, b"\0" * 4, "holds what is no size"),
    "size that overflows": ({"a": F32 | {"shape": [2**60]}}, b"\0" * 4, "holds what is no size"),
    "product that overflows": ({"a": F32 | {"shape": [2**33, 2**33]}}, b"\0" * 4, "its shape and dtype need"),
    "three offsets": ({"a": F32 | {"data_offsets": [0, 2, 4]}}, b"\0" * 4, "data_offsets is malformed"),
    "one offset": ({"a": F32 | {"data_offsets": [4]}}, b"\0" * 4, "data_offsets needs two numbers"),
    "metadata is no object": ({"__metadata__": [], "a": F32}, b"\0" * 4, "not an object of strings"),
    "metadata of numbers": ({"__metadata__": {"rows": 12}, "a": F32}, b"\0" * 4, "not an object of strings"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header(case: str, tmp_path: Path) -> None:
    header, data, says = HEADERS[case]
    with pytest.raises(StorageError) as caught:
        read_header(raw_safetensors(tmp_path / "x.safetensors", header, data))
    assert any(says in reason for reason in caught.value.reasons), caught.value.reasons


@pytest.mark.parametrize("length", [0, 1, 3, 2**32, 2**63, 2**64 - 1])
def test_header_length_that_is_not_the_files(length: int, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="header of"):
        read_header(raw_safetensors(tmp_path / "x.safetensors", b"{}", length=length))


@pytest.mark.parametrize("content", [b"", b"\0", b"\2\0\0\0\0\0\0\0"])
def test_file_shorter_than_a_header(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(StorageError, match="header of"):
        read_header(tmp_path / "x.safetensors")


def test_header_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_files, "HEADER_BYTES", 100)
    with pytest.raises(StorageError, match="header of 101 bytes"):
        read_header(raw_safetensors(tmp_path / "x.safetensors", b"{" + b" " * 99 + b"}"))


def test_all_that_is_wrong_with_a_header_is_said_at_once(tmp_path: Path) -> None:
    header = {"a": F32 | {"dtype": "F8"}, "b": F32 | {"shape": [9]}, "c": 3}
    with pytest.raises(StorageError) as caught:
        read_header(raw_safetensors(tmp_path / "x.safetensors", header, b"\0" * 4))
    assert [reason.split(":")[0] for reason in caught.value.reasons] == ["tensor 'a'", "tensor 'b'", "tensor 'c'"]


def test_terminal_codes_in_names_are_not_passed_on(lab: Lab) -> None:
    edit_weights(lab.lora / ADAPTER_WEIGHTS, lambda w: w.update({"\x1b[2J": w[next(iter(w))]}))
    (lab.lora / "\x1b[2J").write_text("")
    for _ in range(2):  # the name of a file, then that of a tensor
        lab.sign_lora(listed=lambda name: name.isprintable())
        with pytest.raises(VerificationError) as caught:
            lab.check("lora")
        assert all(reason.isprintable() for reason in caught.value.reasons)
        assert sum(r"\x1b[2J" in reason for reason in caught.value.reasons) == 1
        (lab.lora / "\x1b[2J").unlink(missing_ok=True)


# --- the same, in a signed folder ---


def test_truncated_weights_in_a_signed_bundle(lab: Lab) -> None:
    file = lab.bundle / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    lab.sign_bundle()
    refused(lab, "bundle", "truncated or padded")


def test_truncated_weights_in_a_signed_return(lab: Lab) -> None:
    file = lab.lora / ADAPTER_WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    lab.sign_lora()
    refused(lab, "lora", "truncated or padded")


def test_no_weights_at_all(lab: Lab) -> None:
    (lab.bundle / "model.safetensors").unlink()
    lab.sign_bundle()
    refused(lab, "bundle", "found: config.json")


def test_infinite_number_in_the_config(lab: Lab) -> None:
    file = lab.bundle / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e999'))
    assert "1e999" in file.read_text()
    lab.sign_bundle()
    refused(lab, "bundle", "1e999 is out of range")


def test_config_over_the_limit(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from offsite.protocol import signed_folder as module

    monkeypatch.setattr(module, "CONFIG_BYTES", 2000)
    with (lab.bundle / "config.json").open("a") as file:
        file.write(" " * 2000)
    lab.sign_bundle()
    refused(lab, "bundle", "config.json is over 2000 bytes")


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1, "a": 1}', ""])
def test_config_that_is_no_object(lab: Lab, content: str) -> None:
    (lab.bundle / "config.json").write_text(content)
    lab.sign_bundle()
    refused(lab, "bundle", "config.json is not")


# --- the weights' index ---


def shards(lab: Lab, change: Callable[[dict[str, str]], None] = lambda weight_map: None, **files: str) -> None:
    """Put the bundle's weights into one shard with an index, spoiled."""
    name = files.get("name", "model-00001-of-00001.safetensors")
    (lab.bundle / "model.safetensors").rename(lab.bundle / name)
    weight_map = dict.fromkeys(read_header(lab.bundle / name), name)
    change(weight_map)
    (lab.bundle / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    lab.sign_bundle()


def test_honest_shards_pass(lab: Lab) -> None:
    shards(lab)
    lab.check("bundle")


def set_to(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda weight_map: weight_map.update({"model.norm.weight": value})


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "pytorch_model.bin", ".."]
)
def test_index_names_a_file_outside(lab: Lab, name: str) -> None:
    (lab.folder / "outside.safetensors").write_bytes((lab.bundle / "model.safetensors").read_bytes())
    shards(lab, set_to(name))
    refused(lab, "bundle", f"names {name!r}, expected a plain file name in the same folder")


def test_index_names_a_missing_file(lab: Lab) -> None:
    shards(lab, set_to("model-00009-of-00009.safetensors"))
    refused(lab, "bundle", "names model-00009-of-00009.safetensors, which is not there")


def test_index_names_a_tensor_that_is_not_there(lab: Lab) -> None:
    shards(lab, lambda m: m.update(ghost="model-00001-of-00001.safetensors"))
    refused(lab, "bundle", "lists 'ghost' in model-00001-of-00001.safetensors, which does not hold it")


def test_index_hides_a_tensor(lab: Lab) -> None:
    shards(lab, lambda m: m.pop("model.norm.weight") and None)
    refused(lab, "bundle", "does not list 'model.norm.weight'")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "b", "a": "c"}}', "{"])
def test_index_that_is_none(lab: Lab, content: str) -> None:
    shards(lab)
    (lab.bundle / "model.safetensors.index.json").write_text(content)
    lab.sign_bundle()
    refused(lab, "bundle", "no readable weight_map")


def test_index_over_the_limit(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(lab)
    monkeypatch.setattr(safetensors_files, "HEADER_BYTES", 100)
    with pytest.raises(StorageError, match="over 100 bytes"):
        open_checkpoint(lab.bundle)


def test_both_one_file_and_an_index(lab: Lab) -> None:
    """Transformers would read the one file, we the index: two readers, two models."""
    whole = (lab.bundle / "model.safetensors").read_bytes()
    shards(lab)
    (lab.bundle / "model.safetensors").write_bytes(whole)
    lab.sign_bundle()
    refused(lab, "bundle", "it holds both")


def test_shard_that_the_index_does_not_use(lab: Lab) -> None:
    shards(lab)
    raw_safetensors(lab.bundle / "model-00002-of-00002.safetensors", {"a": F32}, b"\0" * 4)
    lab.sign_bundle()
    refused(lab, "bundle", "the index uses")


# --- what stands where a file should ---


def spoiled(file: Path, how: str) -> None:
    content = file.read_bytes()
    file.unlink()
    if how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how == "link":
        elsewhere = file.parent.parent / "elsewhere"
        elsewhere.write_bytes(content)
        file.symlink_to(elsewhere)


NAMES = [
    ("bundle", "config.json"),
    ("bundle", "model.safetensors"),
    ("bundle", "tokenizer_config.json"),
    ("bundle", SIGNATURE),
    ("lora", "adapter_config.json"),
    ("lora", ADAPTER_WEIGHTS),
    ("full", "adapter.safetensors"),
]


@pytest.mark.parametrize("how", ["pipe", "folder", "link"])
@pytest.mark.parametrize(("target", "name"), NAMES)
def test_no_plain_file(lab: Lab, target: str, name: str, how: str) -> None:
    """A link would be read from elsewhere, a pipe never ends: neither is opened."""
    spoiled(lab.folder / target / name, how)
    refused(lab, target, f"{name!r} is not a plain file")


@pytest.mark.parametrize("how", ["pipe", "link"])
def test_manifest_is_no_plain_file(lab: Lab, how: str) -> None:
    spoiled(lab.bundle / MANIFEST, how)
    with pytest.raises(OffsiteError, match="not a plain file"):
        verify(lab.bundle, lab.parties.data_owner)


def test_settings_of_numbers_without_end(lab: Lab) -> None:
    """Their product has more digits than Python prints."""
    edit_json(lab.bundle / "config.json", num_attention_heads=10**60 - 1)
    lab.sign_bundle()
    refused(lab, "bundle", "config.json is not JSON: 99999999999999999999... has 60 digits")


def test_a_mixture_that_declares_modules(lab: Lab) -> None:
    mixture = lab.folder / "mixture-bundle"
    split, config = manifest_of(mixture)["split"], json.loads((mixture / "config.json").read_text())
    declared = Declared(first=split["bottom"], blocks=split["emulator"], mlp_width=8)
    (mixture / "config.json").write_text(json.dumps(wrapped(config, declared)))
    (mixture / "model.safetensors").rename(mixture / "offsite-model.safetensors")
    sign_again(mixture, lab.owner)
    refused(lab, "mixture-bundle", "declares modules that a mixture of experts cannot have")


def test_names_without_end_are_cut(lab: Lab) -> None:
    """Else each refusal would write megabytes to the screen and into the ledger."""
    (lab.lora / ADAPTER_WEIGHTS).unlink()
    raw_safetensors(lab.lora / ADAPTER_WEIGHTS, {"x" * 100_000: 1})
    lab.sign_lora()
    with pytest.raises(VerificationError) as caught:
        lab.check("lora")
    assert max(map(len, caught.value.reasons)) < 600


def test_thousands_of_bad_entries_are_not_all_listed(tmp_path: Path) -> None:
    file = raw_safetensors(tmp_path / "x.safetensors", {f"t{number}": 1 for number in range(5000)})
    with pytest.raises(StorageError) as caught:
        read_header(file)
    assert 100 <= len(caught.value.reasons) < 110


def test_a_plug_in_holds_no_more_than_a_plug_in(lab: Lab) -> None:
    plugged = lab.folder / "plugged"
    (plugged / "pytorch_model.bin").write_bytes(b"pickle")
    lab.parties.owner.trust("hospital", lab.data_owner.public_key, "model-owner")
    sign_again(plugged, lab.data_owner, issuer=lab.data_owner.public_key.hex)
    with pytest.raises(VerificationError) as caught:
        verify_plug_in(plugged, lab.parties.owner)
    assert caught.value.reasons == ("a plug-in may not hold pytorch_model.bin",)


@pytest.mark.parametrize("role", ["data-owner", None])
def test_a_plug_in_is_signed_by_a_model_owner(lab: Lab, role: Role | None) -> None:
    sign_again(lab.folder / "plugged", lab.data_owner, issuer=lab.data_owner.public_key.hex)
    lab.parties.owner.trust("hospital", lab.data_owner.public_key, role)
    with pytest.raises(VerificationError) as caught:
        verify_plug_in(lab.folder / "plugged", lab.parties.owner)
    (reason,) = caught.value.reasons
    assert reason.startswith("a plug-in is signed by a model-owner, and this key is trusted as ")
    assert "--role model-owner" in (caught.value.next_step or "")


def test_what_the_receiver_can_mend_is_not_blamed_on_the_sender(lab: Lab, tmp_path: Path) -> None:
    stranger = Home(tmp_path / "stranger")
    with pytest.raises(VerificationError) as caught:
        verify(lab.bundle, stranger)
    assert "offsite keygen --name" in (caught.value.next_step or "")
    stranger.create_identity("stranger")
    with pytest.raises(VerificationError) as caught:
        verify(lab.bundle, stranger)
    assert "offsite trust add" in (caught.value.next_step or "")
    assert "name the right --home" in (caught.value.next_step or "")
    assert "do not use it" not in (caught.value.next_step or "")
    (lab.bundle / "extra.txt").write_text("x")
    with pytest.raises(VerificationError) as caught:
        verify(lab.bundle, stranger)
    assert "do not use it" in (caught.value.next_step or "")


def test_no_artifact(lab: Lab, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", lab.bundle / "config.json"):
        with pytest.raises(UsageError, match="is not a bundle, return or plug-in"):
            verify(path, lab.parties.owner)


@pytest.mark.parametrize(("target", "other"), [("lora", "bundle"), ("bundle", "return"), ("lora", "plug-in")])
def test_artifact_of_another_kind(lab: Lab, target: str, other: str) -> None:
    check = {"bundle": verify_bundle, "return": verify_return, "plug-in": verify_plug_in}[other]
    with pytest.raises(UsageError, match=f"expected a {other}"):
        check(lab.folder / target, lab.parties.owner)
