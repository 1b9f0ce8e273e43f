"""The data owner's pictures, and the head that it makes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from artifacts import packed
from offsite.config import TuneSpec
from offsite.data.pictures.picture_files import load_processor
from offsite.data_owner import memory_budget
from offsite.data_owner.image_task import ImageTask
from offsite.data_owner.tune import tune
from offsite.data_owner.tuning_pictures import open_album
from offsite.errors import DataError, UsageError
from offsite.progress import Event, silent
from offsite.protocol.artifacts import Bundle
from offsite.protocol.contents import CLASSIFIER
from offsite.protocol.home import Home
from offsite.training.task import Batching
from tiny import tiny_parties, tiny_pictures, tiny_vision_base


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return packed(tiny_vision_base(tmp_path / "base", "dinov2", 4), tmp_path / "bundle", tiny_parties(tmp_path), keep=1)


def spec(**settings: Any) -> TuneSpec:
    usual = {"max_steps": 3, "batch_size": 4, "compute": "fp32", "device": "cpu", "threads": 1, "rank": 2}
    return TuneSpec.model_validate(usual | settings)


def run(tmp_path: Path, bundle: Bundle, pictures: Path, out: str = "return", **settings: Any) -> list[dict[str, Any]]:
    """Tune; the records of the log."""
    tune(bundle, pictures, tmp_path / out, spec(**settings), Home(tmp_path / "hospital-home"))
    return [json.loads(line) for line in (tmp_path / f"{out}.log.jsonl").read_text().splitlines()]


def first_loss(records: list[dict[str, Any]]) -> float:
    return next(float(record["loss"]) for record in records if record["event"] == "step")


def test_held_out_pictures(tmp_path: Path, bundle: Bundle) -> None:
    pictures = tiny_pictures(tmp_path / "set", 10)
    records = run(tmp_path, bundle, pictures, eval_share=0.2)
    before, last = (record for record in records if record["event"] == "validation")
    assert before["step"] == 0
    assert 0 <= last["accuracy"] <= 1
    assert last["loss"] > 0
    album = open_album(bundle.folder, pictures, None, spec(eval_share=0.2), silent)
    assert (len(album.train), len(album.held_out or ())) == (24, 6)
    with pytest.raises(UsageError, match="were both given"):
        open_album(bundle.folder, pictures, pictures, spec(eval_share=0.2), silent)
    tiny_pictures(tmp_path / "parts" / "train", 3)
    tiny_pictures(tmp_path / "parts" / "test", 1)
    album = open_album(bundle.folder, tmp_path / "parts", None, spec(), silent)
    assert (len(album.train), len(album.held_out or ())) == (9, 3)


@pytest.mark.parametrize(
    ("tokens", "sizes"), [(1, [1, 1, 1, 1]), (33, [2, 2]), (34, [2, 2]), (35, [3, 1]), (1024, [4])]
)
def test_pictures_run_at_once_by_their_tokens(tmp_path: Path, bundle: Bundle, tokens: int, sizes: list[int]) -> None:
    album = open_album(bundle.folder, tiny_pictures(tmp_path / "set", 4), None, spec(), silent)
    assert album.tokens == 17  # a class token and 4 x 4 patches
    batching = Batching.of(spec(micro_batch_tokens=tokens))
    task = ImageTask(None, None, None, album, augment=False, batching=batching)  # type: ignore[arg-type]
    assert [len(group) for group in task.micro_batches([3, 1, 0, 2])] == sizes


def test_speed_is_told_in_images(tmp_path: Path, bundle: Bundle) -> None:
    told: list[set[str]] = []
    pictures = tiny_pictures(tmp_path / "set", 4)
    home = Home(tmp_path / "hospital-home")
    tune(bundle, pictures, tmp_path / "return", spec(), home, progress=lambda event: told.append({*event.facts}))
    assert {"loss", "lr", "images/s", "left"} in told
    steps = map(json.loads, (tmp_path / "return.log.jsonl").read_text().splitlines())
    step = next(record for record in steps if record["event"] == "step")
    assert step["images"] == 4
    assert step["images_per_s"] > 0
    assert not [name for name in step if "tokens" in name]


def test_no_task(tmp_path: Path, bundle: Bundle) -> None:
    pictures = tiny_pictures(tmp_path / "set", 1)
    shutil.copytree(pictures / "red", pictures / "rosy")
    with pytest.raises(DataError) as caught:
        open_album(bundle.folder, tiny_pictures(tmp_path / "train", 1), pictures, spec(), silent)
    assert "only among the held-out ones: rosy" in caught.value.reasons[1]
    for name in ("blue", "green", "rosy"):
        shutil.rmtree(pictures / name)
    with pytest.raises(DataError, match="do not make a task"):
        open_album(bundle.folder, pictures, None, spec(), silent)


def test_names_that_cannot_be_returned(tmp_path: Path, bundle: Bundle) -> None:
    pictures = tiny_pictures(tmp_path / "set", 1)
    (pictures / "red").rename(pictures / ("r" * 129))
    with pytest.raises(DataError, match="cannot be returned"):
        open_album(bundle.folder, pictures, None, spec(), silent)


def test_names_of_other_scripts_can_be_returned(tmp_path: Path, bundle: Bundle) -> None:
    pictures = tiny_pictures(tmp_path / "set", 1)
    names = ("feu\u00a0rouge", "\u0646\u0645\u06cc\u200c\u062f\u0627\u0646\u0645")
    for before, name in zip(("red", "blue"), names, strict=True):
        (pictures / before).rename(pictures / name)
    assert {*names} < {*open_album(bundle.folder, pictures, None, spec(), silent).classes}


def test_a_table_whose_pictures_changed_is_another_run(tmp_path: Path, bundle: Bundle) -> None:
    pictures, table = tiny_pictures(tmp_path / "set", 2), tmp_path / "list.csv"
    lines = [f"{file.relative_to(tmp_path)},{file.parent.name}" for file in sorted(pictures.rglob("*.png"))]
    table.write_text("\n".join(["path,label", *lines]))

    def stop(event: Event) -> None:
        if event.stage == "tuning":
            raise KeyboardInterrupt

    home = Home(tmp_path / "hospital-home")
    with pytest.raises(KeyboardInterrupt):
        tune(bundle, table, tmp_path / "return", spec(), home, progress=stop)
    shutil.copy(pictures / "red" / "0.png", pictures / "blue" / "1.png")
    with pytest.raises(UsageError, match="another one") as caught:
        tune(bundle, table, tmp_path / "return", spec(), home, resume=True)
    assert [reason.split(":")[0] for reason in caught.value.reasons] == ["data"]


def test_bad_pictures_are_left_out_on_demand(tmp_path: Path, bundle: Bundle) -> None:
    pictures = tiny_pictures(tmp_path / "set", 2)
    (pictures / "red" / "bad.png").write_text("none")
    with pytest.raises(DataError, match="1 picture cannot be read"):
        run(tmp_path, bundle, pictures)
    steps = [one for one in run(tmp_path, bundle, pictures, skip_bad=True) if one["event"] == "step"]
    assert steps[-1]["step"] == 3


@pytest.mark.parametrize(("start", "factor"), [("probe", 0.1), ("random", 10.0)])
def test_where_the_head_starts_and_how_fast_it_learns(
    tmp_path: Path, bundle: Bundle, start: str, factor: float
) -> None:
    """Adam's first step is of the size of the learning rate, whatever the gradient."""
    pictures = tiny_pictures(tmp_path / "set", 4)
    settings: dict[str, Any] = {"head_start": start, "max_steps": 1, "schedule": "constant", "warmup": 0.0}
    slow = load_file(_tuned(tmp_path, bundle, pictures, "slow", lr=1e-9, **settings))["classifier.weight"]
    fast = load_file(_tuned(tmp_path, bundle, pictures, "fast", lr=1e-3, **settings))["classifier.weight"]
    moved = (fast - slow).abs().max()
    torch.testing.assert_close(moved, torch.tensor(1e-3 * factor), rtol=1e-2, atol=0)
    assert float(slow.abs().max()) > 0
    records = run(tmp_path, bundle, pictures, "again", lr=1e-9, augment=False, batch_size=12, **settings)
    assert (first_loss(records) < 0.5) == (start == "probe")


def _tuned(tmp_path: Path, bundle: Bundle, pictures: Path, out: str, **settings: Any) -> Path:
    run(tmp_path, bundle, pictures, out, **settings)
    return tmp_path / out / CLASSIFIER


def test_memory_is_measured_on_the_pictures(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at once as fit, and the same sum: only the order of adding changes."""
    seen: list[int] = []

    def measured(work: Any, device: torch.device) -> tuple[int, int]:
        seen.append(len(work.args[1].micro_batches[0]))
        work()
        return 2**20, 2**20 * (1 + 100 * seen[-1])

    monkeypatch.setattr(memory_budget, "peak_memory", measured)
    pictures = tiny_pictures(tmp_path / "set", 4)
    records = run(tmp_path, bundle, pictures, memory="300MiB", batch_size=8)
    assert seen == [1, 2]
    plain = run(tmp_path, bundle, pictures, "plain", batch_size=8)
    assert first_loss(records) == pytest.approx(first_loss(plain), rel=1e-5)
    with pytest.raises(UsageError, match="does not fit into 50MiB") as caught:
        run(tmp_path, bundle, pictures, "none", memory="50MiB")
    assert "one picture alone takes" in caught.value.reasons[0]


def test_recomputed_blocks_give_the_same_return(tmp_path: Path, bundle: Bundle) -> None:
    pictures = tiny_pictures(tmp_path / "set", 4)
    plain = _tuned(tmp_path, bundle, pictures, "plain", method="full", lr=1e-3)
    again = _tuned(tmp_path, bundle, pictures, "again", method="full", lr=1e-3, gradient_checkpointing=True)
    assert plain.read_bytes() == again.read_bytes()


def test_bitfit(tmp_path: Path, bundle: Bundle) -> None:
    run(tmp_path, bundle, tiny_pictures(tmp_path / "set", 2), method="bitfit")
    names = set(load_file(tmp_path / "return" / "adapter.safetensors"))
    assert names == {name for name in bundle.manifest.tensors if name.endswith(".bias")}


def test_the_processor_is_the_bundles(bundle: Bundle) -> None:
    assert load_processor(bundle.folder).side == (16, 16)


def test_workers_change_nothing(tmp_path: Path, bundle: Bundle) -> None:
    pictures = tiny_pictures(tmp_path / "set", 4)
    here = _tuned(tmp_path, bundle, pictures, "here", workers=0)
    there = _tuned(tmp_path, bundle, pictures, "there", workers=2)
    assert here.read_bytes() == there.read_bytes()
