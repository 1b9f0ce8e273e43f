"""What is wrong with a signed bundle is for its sender to correct: the data owner is told to ask for another."""

from pathlib import Path

import pytest

from artifacts import GONE, edit_json, sign_again
from offsite.config import TuneSpec
from offsite.data_owner.check_tuning_data import check_tuning_data
from offsite.data_owner.tune import tune
from offsite.errors import DataError, IncompatibleError
from offsite.progress import silent
from offsite.protocol.artifacts import Bundle
from offsite.protocol.verify import verify_bundle
from tiny import MakeBase, Parties, tiny_bundle, tiny_rows


@pytest.fixture
def without_end_token(base_of: MakeBase, parties: Parties, tmp_path: Path) -> Bundle:
    """A bundle as versions before this check signed it."""
    bundle = tiny_bundle(base_of("llama", 3), tmp_path / "bundle", parties)
    edit_json(bundle.folder / "tokenizer_config.json", eos_token=GONE)
    sign_again(bundle.folder, parties.owner.identity())
    return verify_bundle(bundle.folder, parties.data_owner)


def test_nobody_is_advised_to_edit_a_signed_file(without_end_token: Bundle, parties: Parties, tmp_path: Path) -> None:
    rows = tiny_rows(tmp_path / "rows.jsonl")
    for act in (
        lambda: tune(without_end_token, rows, tmp_path / "out", TuneSpec(), parties.data_owner),
        lambda: check_tuning_data(without_end_token, rows, None, TuneSpec(), silent),
    ):
        with pytest.raises(IncompatibleError, match="no end token") as caught:
            act()
        assert (caught.value.next_step or "").startswith("ask the model's owner for another bundle")


def test_rows_are_the_data_owners_own(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    bundle = tiny_bundle(base_of("llama", 3), tmp_path / "bundle", parties)
    (tmp_path / "rows.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(DataError) as caught:
        tune(bundle, tmp_path / "rows.jsonl", tmp_path / "out", TuneSpec(), parties.data_owner)
    assert "owner" not in (caught.value.next_step or "")
