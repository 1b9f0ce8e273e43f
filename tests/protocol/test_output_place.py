"""Where a result may be written: in no bundle, model, run or data, and what the error advises works."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from offsite.errors import UsageError
from offsite.protocol.output_place import kind_of_folder, require_outside, require_place

FLAG = "--out"


def bundle(folder: Path) -> None:
    (folder / "offsite.json").write_text("{}")


def model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def run(folder: Path) -> None:
    (folder / "run.json").write_text("{}")


KINDS = {bundle: "signed folder", model: "model", adapter: "adapter", run: "run"}
Make = Callable[[Path], None]


def advised(error: UsageError) -> Path:
    """The place that the error advises."""
    _, _, words = (error.next_step or "").partition(f"{FLAG} ")
    (place,) = shlex.split(words)
    return Path(place)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("inside", ["out", "deep/er/out"])
def test_inside_something_that_it_would_change(make: Make, inside: str, tmp_path: Path) -> None:
    folder = tmp_path / "one of mine.run"
    folder.mkdir()
    make(folder)
    assert kind_of_folder(folder) == KINDS[make]
    with pytest.raises(UsageError, match="inside the") as caught:
        require_place(folder / inside)
    assert str(folder) in caught.value.what
    assert advised(caught.value) == tmp_path / "out"
    require_place(advised(caught.value))


def test_what_is_advised_is_outside_of_all_and_new(tmp_path: Path) -> None:
    outer = tmp_path / "base"
    (outer / "bundle").mkdir(parents=True)
    model(outer)
    bundle(outer / "bundle")
    (tmp_path / "out").mkdir()
    (tmp_path / "out-2").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError) as caught:
        require_place(outer / "bundle" / "out")
    assert advised(caught.value) == tmp_path / "out-3"


def test_the_folder_that_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="inside the model"):
        require_place(Path("bundle"), Path())
    with pytest.raises(UsageError, match="the command reads") as caught:
        require_place(Path(), Path())
    require_place(advised(caught.value), Path())


def test_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    bundle(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UsageError, match="inside the signed folder"):
        require_place(tmp_path / "link" / "out")


@pytest.mark.parametrize("name", ["rows", "rows.jsonl"])
def test_the_data_itself(name: str, tmp_path: Path) -> None:
    data = tmp_path / name
    data.mkdir() if name == "rows" else data.write_text("{}")
    with pytest.raises(UsageError, match="that the command reads") as caught:
        require_place(data, [data])
    require_place(advised(caught.value), [data])


def test_in_the_data_folder_the_log_would_be_read_as_rows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="inside the folder"):
        require_place(tmp_path / "return", [tmp_path], None)
    pattern = tmp_path / "*.jsonl"
    with pytest.raises(UsageError, match="would become a part of the data") as caught:
        require_place(tmp_path / "return", pattern)
    require_place(advised(caught.value), pattern)
    require_place(tmp_path / "return", tmp_path / "*.parquet")


def test_beside_them_is_well(tmp_path: Path) -> None:
    for make in KINDS:
        (tmp_path / make.__name__).mkdir()
        make(tmp_path / make.__name__)
    require_place(tmp_path / "out", *(tmp_path / make.__name__ for make in KINDS))
    require_outside(tmp_path / "scores.jsonl", tmp_path / "model")


def test_a_folder_of_projects_is_no_model(tmp_path: Path) -> None:
    """A config without weights beside it is any program's."""
    (tmp_path / "config.json").write_text("{}")
    assert kind_of_folder(tmp_path) is None
    require_place(tmp_path / "out")
