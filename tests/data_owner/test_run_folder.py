"""The folder of a run holds hidden states of the data: others cannot read it, and it goes at every end but one."""

import os
from pathlib import Path

import pytest

from artifacts import edit_bundle_weights, packed, sign_again
from offsite.cli import main
from offsite.config import TuneSpec
from offsite.data_owner.tune import tune
from offsite.errors import IncompatibleError
from offsite.progress import Event
from offsite.protocol.verify import verify_bundle
from offsite.training.run_log import log_file, run_folder
from tiny import MakeBase, Parties, tiny_rows


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_only_its_user_can_read_it_and_an_interruption_keeps_it(
    base_of: MakeBase, parties: Parties, tmp_path: Path
) -> None:
    packed(base_of("llama", 3), tmp_path / "bundle", parties, bottom=0, top=2, keep=1)  # a frozen block to cache
    bundle, out = verify_bundle(tmp_path / "bundle", parties.data_owner, hold=True), tmp_path / "return"
    spec = TuneSpec.model_validate({"epochs": 3, "save_every": 1, "checkpoints": 2})
    modes: dict[str, int] = {}

    def watch(event: Event) -> None:
        folder = run_folder(out)
        if event.stage == "tuning" and event.done >= 2:
            modes.update({path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())})
            raise KeyboardInterrupt

    rows = tiny_rows(tmp_path / "rows.jsonl", 20)
    with pytest.raises(KeyboardInterrupt):
        tune(bundle, rows, out, spec, parties.data_owner, progress=watch)
    assert modes.pop("return.run") == 0o700
    assert {"run.json", "state.json", "features.bin"} <= modes.keys()
    assert set(modes.values()) - {modes.get(".lock")} == {0o600}
    assert run_folder(out).exists()
    assert log_file(out).stat().st_mode & 0o777 == 0o600
    bundle = verify_bundle(tmp_path / "bundle", parties.data_owner, hold=True)
    tune(bundle, rows, out, spec, parties.data_owner, resume=True)
    assert not run_folder(out).exists()


def test_it_goes_with_a_run_that_cannot_be_resumed(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    packed(base_of("llama", 3), tmp_path / "bundle", parties)
    edit_bundle_weights(tmp_path / "bundle", lambda arrays: next(iter(arrays.values())).fill(float("nan")))
    sign_again(tmp_path / "bundle", parties.owner.identity())
    bundle = verify_bundle(tmp_path / "bundle", parties.data_owner)
    with pytest.raises(IncompatibleError, match="NaN or infinity"):
        tune(bundle, tiny_rows(tmp_path / "rows.jsonl"), tmp_path / "return", TuneSpec(), parties.data_owner)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "return"))) == []


def test_what_a_finished_run_left_is_removed_by_the_next_command(
    base_of: MakeBase, parties: Parties, tmp_path: Path
) -> None:
    """As if it had been killed between the return and its clean-up."""
    packed(base_of("llama", 3), tmp_path / "bundle", parties)
    words = [
        *("tune", str(tmp_path / "bundle"), "--data", str(tiny_rows(tmp_path / "rows.jsonl")), "--max-steps", "1"),
        *("--out", str(tmp_path / "return"), "--home", str(parties.data_owner.folder)),
    ]
    assert main(words) == 0
    folder = run_folder(tmp_path / "return")
    folder.mkdir()
    (folder / "features.bin").write_text("x")
    assert main([*words, "--resume"]) == 0
    assert not folder.exists()
