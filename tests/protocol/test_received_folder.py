"""What a received folder holds beside the signed files, and what the receiver is advised to do."""

import shutil
import subprocess
from pathlib import Path

import pytest

from artifacts import copied_folder, lora_return
from offsite.errors import VerificationError
from offsite.protocol.artifacts import Bundle
from offsite.protocol.verify import verify_bundle, verify_return
from storage.test_leftovers import LEFT
from tiny import MakeBase, Parties, tiny_bundle, tiny_parties

DISTRUST = "do not use it"


@pytest.fixture(scope="module")
def exchange(base_of: MakeBase, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Parties]:
    folder = tmp_path_factory.mktemp("exchange")
    parties = tiny_parties(folder)
    return tiny_bundle(base_of("llama", 3), folder / "bundle", parties), parties


@pytest.fixture
def received(exchange: tuple[Bundle, Parties], tmp_path: Path) -> tuple[Path, Parties]:
    return copied_folder(exchange[0].folder, tmp_path / "a received bundle"), exchange[1]


def refused(folder: Path, parties: Parties) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        verify_bundle(folder, parties.data_owner)
    return caught.value


def deletes(error: VerificationError) -> None:
    """Run the command that the error advises."""
    advice, _, command = (error.next_step or "").partition(": rm ")
    assert advice.startswith("delete these files")
    subprocess.run(["bash", "-c", f"rm {command}"], check=True)


@pytest.mark.parametrize("name", LEFT)
def test_what_a_program_left_is_deleted_and_the_folder_verifies(received: tuple[Path, Parties], name: str) -> None:
    folder, parties = received
    (folder / name).mkdir() if name.startswith((".git", "__", "@")) else (folder / name).write_text("x")
    error = refused(folder, parties)
    (reason,) = error.reasons
    assert reason.startswith(f"{name!r} is not listed in offsite.json; by its name a ")
    deletes(error)
    assert verify_bundle(folder, parties.data_owner).folder == folder


def test_all_of_them_at_once(received: tuple[Path, Parties]) -> None:
    folder, parties = received
    for name in LEFT[:15]:
        (folder / name).write_text("x")
    deletes(refused(folder, parties))
    verify_bundle(folder, parties.data_owner)


def test_a_file_that_somebody_put_there_is_still_for_distrust(received: tuple[Path, Parties]) -> None:
    folder, parties = received
    (folder / ".DS_Store").write_text("x")
    (folder / "notes.txt").write_text("x")
    error = refused(folder, parties)
    assert len(error.reasons) == 2
    assert (error.next_step or "").startswith(DISTRUST)


@pytest.mark.parametrize("half", ["{}.part", "{}.crdownload", ".{}.a1B2c3"])
def test_a_transfer_that_has_not_ended(received: tuple[Path, Parties], half: str) -> None:
    folder, parties = received
    whole, part = folder / "model.safetensors", folder / half.format("model.safetensors")
    shutil.move(whole, part)
    error = refused(folder, parties)
    assert "model.safetensors is missing" in error.reasons
    assert error.next_step == (
        "wait until model.safetensors has arrived, or fetch the folder again; then verify it again"
    )
    shutil.move(part, whole)
    verify_bundle(folder, parties.data_owner)


def test_a_file_is_missing_and_no_half_of_it_is_there(received: tuple[Path, Parties]) -> None:
    folder, parties = received
    (folder / "model.safetensors").unlink()
    (folder / "other.safetensors.part").write_text("x")
    assert (refused(folder, parties).next_step or "").startswith(DISTRUST)


def test_in_a_return_too(exchange: tuple[Bundle, Parties], tmp_path: Path) -> None:
    bundle, parties = exchange
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    (returned.folder / "Thumbs.db").write_text("x")
    with pytest.raises(VerificationError) as caught:
        verify_return(returned.folder, parties.owner, bundle.manifest)
    deletes(caught.value)
    verify_return(returned.folder, parties.owner, bundle.manifest)
