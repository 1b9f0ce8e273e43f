"""One look shows every reason."""

import pytest

from artifacts import edit_json, edit_weights, manifest_of, sign_again
from attacks.lab import Lab
from offsite.errors import PolicyError, VerificationError
from offsite.model_owner.intake import intake
from offsite.model_owner.ledger import Ledger
from offsite.protocol import verify as verify_module
from offsite.protocol.contents import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from offsite.protocol.manifest import MANIFEST
from offsite.protocol.verify import verify_plug_in, verify_return


def poison(weights: dict) -> None:
    next(iter(weights.values())).flat[0] = float("nan")


def test_three_faults_of_a_bundle(lab: Lab) -> None:
    edit_json(lab.bundle / "config.json", auto_map={"AutoConfig": "x.Y"}, num_hidden_layers=9, hidden_act=True)
    lab.sign_bundle()
    with pytest.raises(VerificationError) as caught:
        lab.check("bundle")
    said = "\n".join(caught.value.reasons)
    assert len(caught.value.reasons) == 3
    for says in ("hidden_act = 'True'", "'auto_map' is not permitted", "block counts"):
        assert says in said


def test_faults_of_a_return_by_three_rules(lab: Lab) -> None:
    edit_weights(lab.lora / ADAPTER_WEIGHTS, poison)
    edit_json(lab.lora / ADAPTER_CONFIG, init_lora_weights="olora")
    lab.sign_lora(signer=lab.data_owner.public_key.hex, lora={**manifest_of(lab.lora)["lora"], "alpha": 9.0})
    with pytest.raises(VerificationError) as caught:
        lab.check("lora")
    said = "\n".join(caught.value.reasons)
    for says in ("holds NaN or infinity", "is not the one that these LoRA settings give"):
        assert says in said
    assert str(caught.value).count("\n  - ") == len(caught.value.reasons) == 2


def test_what_is_not_the_signers_is_not_read_further(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signer and list of files, bytes, contents: the first step that fails ends the check, with all that it finds."""
    edit_weights(lab.lora / ADAPTER_WEIGHTS, poison)
    sign_again(lab.lora, lab.mallory, signer=lab.mallory.public_key.hex, recipient=lab.mallory.public_key.hex)
    (lab.lora / "data.jsonl").write_text("{}")
    monkeypatch.setattr(verify_module, "read_file", lambda *_, **__: pytest.fail("a stranger's file was read"))
    assert [reason.split(" ")[0] for reason in reasons_of(lab, "lora")] == ["signed", "addressed", "'data.jsonl'"]


def test_bytes_are_compared_before_they_are_parsed(lab: Lab) -> None:
    (lab.bundle / "config.json").write_text("{" * (lab.bundle / "config.json").stat().st_size)
    assert reasons_of(lab, "bundle") == ("the bytes of config.json are not those that were signed",)


def test_a_file_of_another_size_is_not_read(lab: Lab) -> None:
    with (lab.bundle / "model.safetensors").open("r+b") as file:
        file.truncate(2**40)  # sparse: it takes no space, and hashing it would take an hour
    assert reasons_of(lab, "bundle")[0].startswith("model.safetensors has 1099511627776 bytes, expected")


def test_a_large_file_with_a_broken_header_is_not_hashed(lab: Lab) -> None:
    entries = manifest_of(lab.bundle)["files"]
    with (lab.bundle / "model.safetensors").open("r+b") as file:
        file.truncate(2**40)
    for entry in entries:
        entry["size"] = 2**40 if entry["name"] == "model.safetensors" else entry["size"]
    sign_again(lab.bundle, lab.owner, rehash=False, files=entries)
    assert "1099511" in " ".join(reasons_of(lab, "bundle"))


def reasons_of(lab: Lab, target: str) -> tuple[str, ...]:
    with pytest.raises(VerificationError) as caught:
        lab.check(target)
    return caught.value.reasons


def test_verification_and_policy_together_are_a_failed_verification(lab: Lab) -> None:
    edit_weights(lab.folder / "rank-9" / ADAPTER_WEIGHTS, poison)
    sign_again(lab.folder / "rank-9", lab.data_owner)
    with pytest.raises(VerificationError) as caught:
        lab.check("rank-9")
    assert any("NaN" in reason for reason in caught.value.reasons)
    assert any("rank 9" in reason for reason in caught.value.reasons)


def test_wider_than_permitted(lab: Lab) -> None:
    with pytest.raises(PolicyError, match="settings that the bundle does not permit") as caught:
        lab.check("width-9")
    assert caught.value.reasons == ("bottlenecks of width 9, the bundle permits up to 8",)


def test_return_for_another_owner(lab: Lab) -> None:
    lab.sign_lora(recipient=lab.carol.public_key.hex)
    assert [reason.split(" SHA")[0] for reason in reasons_of(lab, "lora")] == ["addressed to"]


def test_a_reason_is_given_once_and_the_list_has_an_end(lab: Lab) -> None:
    for number in range(100):
        (lab.bundle / f"file{number:03}").write_text("")
    with pytest.raises(VerificationError) as caught:
        lab.check("bundle")
    assert len(caught.value.reasons) == 41
    assert caught.value.reasons[-1] == "and 60 more"
    assert len(set(caught.value.reasons)) == 41


# --- policy: genuine, but not permitted (exit code 5); what became of it stands in the ledger ---


def digest(folder) -> str:
    import hashlib

    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("rank-9", "LoRA of rank 9, the bundle permits up to 8"),
        ("forbidden-full", "tuned by full, the bundle permits lora"),
    ],
)
def test_beyond_the_policy(lab: Lab, target: str, says: str) -> None:
    with pytest.raises(PolicyError) as caught:
        intake(lab.folder / target, lab.parties.owner)
    assert caught.value.exit_code == 5
    assert caught.value.reasons == (says,)
    assert Ledger(lab.parties.owner.ledger).intakes(digest(lab.folder / target)) == [("refused", [says])]


def test_both_policies_at_once(lab: Lab) -> None:
    with pytest.raises(PolicyError) as caught:
        verify_return(lab.folder / "rank-9", lab.parties.owner, lab.parent().model_copy(update={"methods": ("full",)}))
    assert len(caught.value.reasons) == 2


def test_refusals_are_recorded_with_their_reasons(lab: Lab) -> None:
    edit_weights(lab.lora / ADAPTER_WEIGHTS, poison)
    lab.sign_lora()
    for _ in range(2):
        with pytest.raises(VerificationError):
            intake(lab.lora, lab.parties.owner)
    recorded = Ledger(lab.parties.owner.ledger).intakes(digest(lab.lora))
    assert [state for state, _ in recorded] == ["refused", "refused"]
    assert "NaN" in recorded[0][1][0]


def test_unreadable_manifest_is_recorded(lab: Lab) -> None:
    (lab.lora / MANIFEST).write_text("{")
    with pytest.raises(VerificationError):
        intake(lab.lora, lab.parties.owner)
    [(state, reasons)] = Ledger(lab.parties.owner.ledger).intakes(digest(lab.lora))
    assert state == "refused"
    assert "not JSON" in reasons[0]


def test_parent_that_this_owner_never_issued(lab: Lab) -> None:
    lab.sign_lora(bundle="0" * 64)
    (lab.lora / "stray").write_text("")
    with pytest.raises(VerificationError) as caught:
        intake(lab.lora, lab.parties.owner)
    assert caught.value.exit_code == 3
    assert [reason[:30] for reason in caught.value.reasons] == [
        "it answers a bundle that this ",
        "'stray' is not listed in offsi",
    ]
    assert [state for state, _ in Ledger(lab.parties.owner.ledger).intakes(digest(lab.lora))] == ["refused"]


def test_without_the_parent_an_adapter_config_is_still_checked(lab: Lab) -> None:
    verify_return(lab.lora, lab.parties.owner)
    edit_json(lab.lora / ADAPTER_CONFIG, target_modules="all-linear")
    lab.sign_lora()
    with pytest.raises(VerificationError, match="not the one that these LoRA settings give"):
        verify_return(lab.lora, lab.parties.owner)


def test_without_the_parent_tensor_names_are_still_checked(lab: Lab) -> None:
    manifest = manifest_of(lab.lora)
    name = next(iter(manifest["tensors"]))
    manifest["tensors"]["evil"] = manifest["tensors"].pop(name)
    edit_weights(lab.lora / ADAPTER_WEIGHTS, lambda w: w.update(evil=w.pop(name)))
    lab.sign_lora(tensors=manifest["tensors"])
    with pytest.raises(VerificationError, match="tensors: unexpected 'evil'"):
        verify_return(lab.lora, lab.parties.owner)


def test_plug_in_changed_afterwards(lab: Lab) -> None:
    plugged = lab.folder / "plugged"
    verify_plug_in(plugged, lab.parties.owner)
    edit_json(plugged / ADAPTER_CONFIG, r=5)
    with pytest.raises(VerificationError, match="adapter_config"):
        verify_plug_in(plugged, lab.parties.owner)
