"""A mistyped name gets the known one that is closest to it, wherever names are given."""

from pathlib import Path

import pytest

from offsite.cli import main
from offsite.config import PackSpec, TuneSpec, load_spec
from offsite.errors import UsageError
from offsite.spelling import nearest, suggest


def test_the_nearest_name_is_found() -> None:
    known = ["hospital", "clinic", "max_steps"]
    assert nearest("hosptial", known) == "hospital"
    assert nearest("HOSPITAL", known) == "hospital"
    assert nearest("max-step", known) == "max_steps"
    assert nearest("xyz", known) is None
    assert suggest("clinc", known) == "did you mean 'clinic'?"
    assert suggest("xyz", known) == "expected one of hospital, clinic, max_steps"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[tune]\nbatchsize = 3\n", "batchsize: did you mean 'batch_size'?"),
        ("[tuen]\nbatch_size = 3\n", "tuen: did you mean 'tune'?"),
        ('[tune]\nmethod = "lroa"\n', "did you mean 'lora'?"),
        ('[pack]\nprune_by = "wnada"\n', "did you mean 'wanda'?"),
        ('[pack]\nheal = "refti,distill"\n', "did you mean 'refit'?"),
        ('[tune]\ncolumns = {promt = "question"}\n', "did you mean 'prompt'?"),
    ],
)
def test_a_mistyped_setting_or_choice_gets_the_nearest(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "settings.toml").write_text(content)
    kind = PackSpec if "[pack]" in content else TuneSpec
    with pytest.raises(UsageError) as caught:
        load_spec(kind, {}, tmp_path / "settings.toml")
    assert says in " ".join(caught.value.reasons)


def test_a_wrong_choice_that_resembles_none_gets_no_guess() -> None:
    with pytest.raises(UsageError) as caught:
        load_spec(PackSpec, {"prune_by": "xyz"})
    assert "did you mean" not in " ".join(caught.value.reasons)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tun", "bundle"], "Did you mean 'tune'?"),
        (["tune", "bundle", "--data", "x", "--out", "y", "--max-step", "3"], "--max-steps"),
        (["inspect", "bundle", "--jsn"], "--json"),
    ],
)
def test_a_mistyped_command_or_flag_gets_the_nearest(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert says in capsys.readouterr().err
