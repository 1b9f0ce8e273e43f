"""TensorBoard's event files, with a writer of ours in the place of its own (which is no dev requirement)."""

import json

import pytest

from offsite import extras
from offsite.config import TuneSpec
from offsite.data_owner.tune import tune
from offsite.errors import StorageError, UsageError
from offsite.training import tensorboard as stage
from offsite.training.run_log import log_file
from offsite.training.tensorboard import tensorboard_log
from tiny import tiny_base, tiny_bundle, tiny_parties, tiny_rows

SPEC = TuneSpec(
    rank=2, max_steps=4, batch_size=4, save_every=1, eval_every=2, compute="fp32", device="cpu", threads=1
)  # fmt: skip


class Writer:
    """What of SummaryWriter is used."""

    made: "list[Writer]" = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, log_dir, purge_step):
        self.log_dir, self.purge_step, self.scalars, self.closed = log_dir, purge_step, [], False
        Writer.made.append(self)

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    Writer.made = []
    monkeypatch.setattr(stage, "require_tensorboard", lambda: Writer)
    monkeypatch.setattr("offsite.data_owner.check_tuning.require_tensorboard", lambda: Writer)
    return Writer.made


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    parties = tiny_parties(folder)
    bundle = tiny_bundle(tiny_base(folder / "base", blocks=3), folder / "bundle", parties)
    return bundle, tiny_rows(folder / "rows.jsonl", 8), parties.data_owner


def test_the_board_shows_what_the_log_says(house, tmp_path, writers):
    bundle, rows, home = house
    out = tmp_path / "return"
    tune(bundle, rows, out, SPEC, home, eval_data=rows, tensorboard=tmp_path / "board")
    (writer,) = writers
    assert (writer.log_dir, writer.purge_step, writer.closed) == (str(tmp_path / "board"), 1, True)
    expected = []
    for record in map(json.loads, log_file(out).read_text().splitlines()):
        tag = {"step": "train", "validation": "validation"}.get(record["event"])
        if tag:
            names = [name for name in record if name not in ("event", "step", "time")]
            expected += [(f"{tag}/{name}", record[name], record["step"]) for name in names]
    assert writer.scalars == expected
    assert {tag for tag, *_ in expected} == {
        "train/loss", "train/lr", "train/grad_norm", "train/tokens", "train/labels", "train/tokens_per_s",
        "validation/loss", "validation/perplexity",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} >= {"offsite.json"}
    assert not any("board" in path.name for path in out.iterdir())


def test_a_resumed_run_goes_on_in_the_same_curves(house, tmp_path, writers):
    bundle, rows, home = house

    def stop(event):
        if event.stage == "tuning" and event.done == 2:
            raise KeyboardInterrupt

    def run(**more):
        tune(bundle, rows, tmp_path / "return", SPEC, home, tensorboard=tmp_path / "board", **more)

    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)
    assert writers[0].closed
    run(resume=True)
    assert [writer.purge_step for writer in writers] == [1, 3]
    assert [step for tag, _, step in writers[1].scalars if tag == "train/loss"] == [3, 4]


def test_whether_there_is_a_board_does_not_change_the_run(house, tmp_path, writers):
    """Neither what comes back nor whether a run may be resumed."""
    bundle, rows, home = house
    for name, folder in (("with", tmp_path / "board"), ("without", None)):
        tune(bundle, rows, tmp_path / name, SPEC, home, tensorboard=folder)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("with", "without")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_tensorboard_nothing_is_started(house, tmp_path, monkeypatch):
    bundle, rows, home = house

    def missing(module):
        raise ModuleNotFoundError("No module named 'tensorboard'")

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(UsageError) as caught:
        tune(bundle, rows, tmp_path / "return", SPEC, home, tensorboard=tmp_path / "board")
    assert "[tensorboard]" in str(caught.value.next_step)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["return", "return/board", "return.run/board"])
def test_a_folder_inside_the_return_is_refused_before_any_work(house, tmp_path, writers, place):
    bundle, rows, home = house
    with pytest.raises(UsageError, match="--tensorboard"):
        tune(bundle, rows, tmp_path / "return", SPEC, home, tensorboard=tmp_path / place)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(stage, "require_tensorboard", lambda: refuse)
    with pytest.raises(StorageError, match="board"), tensorboard_log(tmp_path / "board") as write:
        write({"event": "start", "step": 0})


def test_no_folder_writes_nothing(writers):
    with tensorboard_log(None) as write:
        write({"event": "step", "step": 1, "loss": 2.0})
    assert writers == []
