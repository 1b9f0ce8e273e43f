"""What the benchmark of image encoders measures: cells that can be cut, the same pictures for all, operations."""

import json

import numpy as np
import pytest
import torch
from benchmarks.compared import write_beside
from benchmarks.image_cells import BEST, CELLS, ImageCell, split_of
from benchmarks.image_peers import SEED, album_of, classifier, collated, order_of
from benchmarks.random_encoder import SHAPES, write_pictures
from benchmarks.work import Work
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import images
from offsite import TuneSpec
from offsite.data_owner.image_task import ImageTask
from offsite.models.image_encoder import encoder_of
from offsite.models.loading import load_model
from offsite.training.task import Batching
from tiny import tiny_pictures, tiny_vision_base

WANTED = {"bf16": False, "method": "full", "attention": "eager"}  # whose products the counter sees


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda cell: cell.shape)
def test_cells_can_be_cut(cell):
    settings = SHAPES[cell.shape][1]
    assert settings["image_size"] == cell.side
    assert all(cell.rows % batch == 0 for batch in cell.batches)
    assert cell.warmup >= 1
    for name in set(cell.contestants) - set(BEST):
        assert sum(split_of(name)) <= settings["num_hidden_layers"]


def test_made_up_pictures_are_of_every_class(tmp_path):
    write_pictures(tmp_path, 5, 2)
    assert sorted(len(list(folder.iterdir())) for folder in tmp_path.iterdir()) == [2, 3]


def test_peers_are_given_the_arrays_of_a_tuning(tmp_path):
    base = tiny_vision_base(tmp_path / "base")
    album = album_of(base, tiny_pictures(tmp_path / "pictures"))
    task = ImageTask(None, None, None, album, augment=True, batching=Batching.of(TuneSpec(batch_size=6)))
    assert TuneSpec().seed == SEED
    steps = task.order(0)
    assert order_of(album, SEED) == [row for step in steps for row in step]
    seen = []
    batch, album.train.batch = album.train.batch, lambda rows, draw: seen.append(batch(rows, draw)) or seen[-1]
    given = collated(album, steps[0])
    with pytest.raises(AttributeError):  # there is no encoder here
        task.loss(steps[0], 0)
    assert np.array_equal(seen[0], seen[1])
    assert torch.equal(given["labels"], album.labels(album.train)[steps[0]])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["dinov2", "clip tower"])
def test_lora_of_the_whole_sits_on_every_block_and_trains_the_classifier(tmp_path, kind):
    base = tiny_vision_base(tmp_path / "base", kind, 3)
    model = classifier({**WANTED, "base": str(base), "method": "lora"}, 3)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len([name for name in trained if "lora_A" in name]) == 3 * 6
    assert len([name for name in trained if "classifier" in name]) == 2


def test_operations_are_those_that_torch_counts(tmp_path):
    base = tiny_vision_base(tmp_path / "base", "dinov2", 4)
    pixels = torch.zeros(2, 3, 16, 16)
    whole = classifier({**WANTED, "base": str(base)}, 3)
    with FlopCounterMode(display=False) as counter:
        whole(pixels, torch.tensor([0, 2]))["loss"].backward()
    assert 2 * images.operations(base, "full") == pytest.approx(counter.get_total_flops(), rel=0.05)
    body = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    body.set_attn_implementation("eager")
    for block in body.encoder.layer[2:]:
        block.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        encoder_of(body).features(pixels.numpy()).sum().backward()
    counted = 2 * images.operations(base, "offsite full, 0-2-2")
    # the first trained block's inputs want no gradient, which the formula does not look into
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.08)


def test_records_hold_contestants_against_each_other(tmp_path, monkeypatch):
    cell = ImageCell("vit-s-14", ("0-4-4",), 4, 1, 2, (4,))
    one = object.__new__(images.Measurements)
    one._cell, one._quick = cell, True
    run = {"peak_bytes": 100, "at": "2026-01-01T00:00:00"}
    runs = {
        "full": [{**run, "seconds": [1.0, 3.0]}],
        "offsite full, 0-4-4": [{**run, "peak_bytes": 50, "seconds": [0.5, 0.5], "matmul_flops": [1200.0, 2000.0]}],
    }
    counted = {"full": 300.0, "offsite full, 0-4-4": 100.0}
    records = [one._record(name, runs, counted) for name in runs]
    found = records[1]
    assert found["images_per_s"] == 8
    assert (found["speed_vs_full"], found["memory_vs_full"], found["counted_bound_vs_full"]) == (4, 2, 3)
    assert found["share_of_peak"] == 0.5
    assert "| offsite full, 0-4-4 | 8.00 (8.00 to 8.00)" in images.table({"records": records})

    work, file = Work(tmp_path / "work", 1), tmp_path / "images.json"
    other = {**found, "shape": "clip-vit-l-14"}
    write_beside(file, work, [other], ("shape",), list(CELLS))
    write_beside(file, work, records, ("shape",), list(CELLS))
    assert [one["shape"] for one in json.loads(file.read_text())["records"]] == [*["vit-s-14"] * 2, "clip-vit-l-14"]
    monkeypatch.setattr("benchmarks.compared.machine", lambda threads, fp32: {"threads": 64})
    write_beside(file, work, records, ("shape",), list(CELLS))  # what another machine measured does not stay
    assert len(json.loads(file.read_text())["records"]) == 2
