"""What the benchmark of tuning measures: every cell can be planned, and its figures are of the same thing."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from benchmarks.cells import BEST, CELLS, CONTESTANTS, DEFAULT, FIRST, PADDED, PEERS, SHAPES, Cell
from benchmarks.compared import HABITS, fastest_habits, said_products, share_of_peak, usual_habits
from benchmarks.counted import Shape
from benchmarks.render import DOCUMENT, headline, predictions
from benchmarks.steps import encoded, steps_of
from benchmarks.work import Work

from benchmarks import tuning, work
from tiny import tiny_base

ROWS = [{"prompt": "a" * (1 + i % 5), "completion": " " + "b" * (1 + i)} for i in range(24)]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "letters"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder.parent


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda cell: cell.name)
def test_cells_name_what_is_there(cell):
    assert cell.shape in SHAPES
    assert set(cell.contestants) <= set(CONTESTANTS)
    assert all(cell.rows % batch == 0 for batch in cell.batches)
    assert cell.warmup >= 1


def test_every_default_cell_but_the_long_rows_has_the_peers_at_their_best():
    assert all(set(BEST) <= set(CELLS[name].contestants) for name in DEFAULT if not CELLS[name].longest)


def test_rows_are_of_every_length(tmp_path, data):
    work = Work(tmp_path / "work", 1)
    rows = work.rows(Cell("smollm2", "letters", 1, 1, (1,), rows=4), data).read_text().splitlines()
    sizes = sorted(len(json.loads(row)["completion"]) for row in rows)
    assert len(sizes) == 8
    assert sizes[0] <= 5
    assert sizes[-1] >= 22


def test_long_rows_are_the_longest(tmp_path, data):
    work = Work(tmp_path / "work", 1)
    rows = work.rows(Cell("smollm2", "letters", 1, 1, (1,), rows=1, longest=True), data).read_text().splitlines()
    assert sorted(len(json.loads(row)["completion"]) for row in rows) == [24, 25]


def test_missing_rows_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"letters/train\.jsonl.*\n.*--data-root"):
        Work(tmp_path / "work", 1).source(tmp_path, "letters")


def test_a_measurement_is_taken_once_while_it_is_of_the_same_thing(tmp_path):
    taken = []

    def measure():
        taken.append(1)
        return {"seconds": len(taken)}

    for of in ("this", "this", "that"):
        Work(tmp_path, 1).once("key", of, measure)  # a new one each time, as after an interruption
    assert len(taken) == 2
    assert Work(tmp_path, 1).once("key", "that", measure)["seconds"] == 2


def test_products_between_two_runs_are_measured_once(tmp_path, monkeypatch):
    speeds = iter("123")
    monkeypatch.setattr("benchmarks.work.run", lambda command: (next(speeds), 0))
    work = Work(tmp_path, 1)
    found = [work.beside_products(lambda: {"seconds": 1})["matmul_flops"] for _ in range(2)]
    assert found[0] == [1.0, 1.0]  # nothing came between them here
    work._products_at -= 60
    assert work.beside_products(lambda: {"seconds": 1})["matmul_flops"] == [2.0, 2.0]


def test_ours_alone_run_more_often():
    alone, beside_peers = CELLS["gpt2-large/wikitext2"], CELLS["gpt2-large/sciq"]
    assert (alone.times(3), beside_peers.times(3)) == (5, 3)


def test_what_was_measured_hours_ago_is_measured_anew(tmp_path):
    Work(tmp_path, 1).once("key", "this", lambda: {"seconds": 1})
    log = tmp_path / "measurements.jsonl"
    record = json.loads(log.read_text())
    log.write_text(json.dumps(record | {"at": f"{int(record['at'][:4]) - 1}{record['at'][4:]}"}) + "\n")
    assert Work(tmp_path, 1).once("key", "this", lambda: {"seconds": 2})["seconds"] == 2
    assert Work(tmp_path, 1).once("key", "this", lambda: {"seconds": 3})["seconds"] == 2


def test_a_measurement_of_another_processor_does_not_count(tmp_path, monkeypatch):
    found = []
    for name in ("one", "other"):
        monkeypatch.setattr(work, "processor", lambda name=name: {"processor": name, "instructions": []})
        found.append(Work(tmp_path, 1).once("key", "this", lambda name=name: {"taken_on": name})["taken_on"])
    assert found == ["one", "other"]


def test_peers_see_the_rows_of_a_tuning(tmp_path, data):
    """The steps that peers are fed are those that `offsite tune` takes under the same seed."""
    from offsite import TuneSpec
    from offsite.data_owner.text_task import TextTask
    from offsite.training.schedule import rows_of_steps
    from offsite.training.task import Batching

    base = tiny_base(tmp_path / "base")
    examples = encoded(base, data / "letters" / "train.jsonl")
    batching = Batching.of(TuneSpec(batch_size=4, seed=3))
    rows_of = rows_of_steps(TextTask(None, examples, (), batching).order)
    for step, rows in enumerate(steps_of(examples, 4, 6, seed=3)):
        lengths = [len(row.ids) for row in rows]
        assert lengths == sorted(lengths)
        assert lengths == sorted(len(examples[i].ids) for i in rows_of(step)[1])


def test_records_hold_contestants_against_each_other():
    one = object.__new__(tuning.Measurements)
    one._cell = Cell("smollm2", "letters", 1, 2, (4,), rows=4)
    one._quick = True
    one.plan = {"tokens": 80, "rows": 8, "padded": 88, "squares": 800, "labels": 8, "longest": 20}
    run = {"peak_bytes": 100, "at": "2026-01-01T00:00:00"}
    runs = {
        "lora": [{**run, "seconds": [1.0, 3.0]}],
        "offsite lora": [{**run, "peak_bytes": 50, "seconds": [0.5, 0.5], "matmul_flops": [12e3, 20e3]}],
    }
    counted = {"lora": 300.0, "offsite lora": 100.0}
    found = one._record("offsite lora", runs, counted)
    assert found["tokens_per_s"] == 80
    assert found["examples_per_s"] == 8
    assert found["speed_vs_lora"] == 4
    assert found["counted_bound_vs_lora"] == 3
    assert found["memory_vs_lora"] == 2
    assert found["share_of_peak"] == 0.5
    assert one._record("lora", runs, counted)["share_of_peak"] == 0.375  # beside no products of its own
    assert one._record("lora", {"lora": runs["lora"]}, counted)["share_of_peak"] is None
    assert "offsite lora" in tuning.table({"records": [found]})
    before = {"shape": "smollm2", "data": "letters", "contestant": "offsite lora", "counted_bound_vs_lora": 3.0}
    assert "| lora | 3.0 | 4.0 |" in predictions([before], [found])


def test_a_share_is_of_the_products_at_the_time():
    runs = [{"matmul_flops": [100.0, 300.0]}, {"matmul_flops": [1000.0, 1000.0]}, {"matmul_flops": [50.0, 50.0]}]
    assert share_of_peak(runs, [10.0, 20.0, 4.0], 10.0, usual=[1.0]) == 0.5
    assert said_products({"matmul_gflops": [5, 9]}) == "matrix products reach 9, and 5 at the least, GFLOP/s"
    assert said_products({"matmul_peak_gflops": 7}) == "matrix products reach 7 GFLOP/s"
    assert said_products({"matmul_gflops": None}) == "matrix products were not measured"


def test_everybody_in_fp32_is_measured_apart(tmp_path):
    plain, wide = Work(tmp_path, 1), Work(tmp_path, 1, fp32=True)
    assert plain.once("key", 0, lambda: {"found": 1})["found"] == 1
    assert wide.once("key", 0, lambda: {"found": 2})["found"] == 2
    assert Work(tmp_path, 1).once("key", 0, lambda: {"found": 3})["found"] == 1


def test_the_document_has_the_measured_ratios_of_lora():
    alone = {"shape": "s", "data": "long", "contestant": "offsite lora", "tokens_per_s": 9.0}
    one = {
        **alone,
        "data": "d",
        "speed_vs_full": 5.1,
        "speed_vs_lora": 4.0,
        "memory_vs_full": 6.0,
        "memory_vs_lora": 2.5,
    }
    table = headline(
        [alone, one, {**one, "contestant": "offsite full"}, {**one, "data": "e", "speed_vs_full_padded": 16}]
    )
    assert table.splitlines()[2:] == [
        "| s, d | 5.1 / 4.0 | not run | 6.0 / 2.5 |",
        "| s, e | 5.1 / 4.0 | 16 | 6.0 / 2.5 |",
    ]
    assert headline(json.loads(tuning.RESULT.read_text())["records"]) in DOCUMENT.read_text()


@pytest.mark.parametrize(("longest", "width"), [(69, 72), (72, 80), (1024, 1024)])
def test_the_paper_pads_to_the_longest_row_of_the_data(longest, width):
    one = object.__new__(tuning.Measurements)
    one.plan = {"longest": longest}
    assert all(one._pad_to(name) == width for name in PADDED)
    assert all(one._pad_to(name) is None for name in set(PEERS) - set(PADDED))


def test_operations_are_those_of_the_contestant():
    shape = Shape(4, 3, 2, 0, block=100_000, pairs=100, attended=10, head=500, tokens=20, context=25, labelled=0.1)
    assert tuning.operations(shape, "full", None) > tuning.operations(shape, "lora", None)
    assert tuning.operations(shape, "offsite lora", None) < tuning.operations(shape, "offsite full", None)
    assert tuning.operations(shape, PADDED[0], 40) > 2 * tuning.operations(shape, "full", None)


def peers_of(cell: str, speed: Callable[[Mapping[str, Any]], float]) -> tuple[tuning.Measurements, list[str]]:
    """A cell whose peers ran fastest in plain attention on the first cell's short rows."""
    one, tried = object.__new__(tuning.Measurements), []
    one._cell, one._quick = CELLS[cell], False
    one._settled = lambda method: {**HABITS, "attention": "eager"}

    def measured(key: str, method: str, settings: Mapping[str, Any], steps: int) -> float:
        tried.append(key.split("/")[-1])
        return speed(settings)

    one._speed = measured
    return one, tried


def test_unusual_habits_are_tried_again_on_other_rows():
    one, _ = peers_of("smollm2/gsm8k", lambda way: way["batch"] * (2 if way["attention"] == "sdpa" else 1))
    assert one._habits_of("full") == {**HABITS, "batch": 8}
    one, _ = peers_of("smollm2/gsm8k", lambda way: (2 if way["attention"] == "eager" else 1) / way["batch"])
    assert one._habits_of("full") == {**HABITS, "attention": "eager", "batch": 4}
    one, tried = peers_of("smollm2/sciq", lambda way: way["batch"])
    assert one._habits_of("full") == {**HABITS, "attention": "eager", "batch": 16}
    assert tried == ["4 at once", "16 at once"]


def test_a_habit_changes_only_where_that_is_clearly_faster():
    usual = usual_habits(bf16=True)
    speeds = {"habits": 100.0, "keep_freed False": 104.0, "wait PASSIVE": 90.0, "bf16 False": 103.0}
    assert fastest_habits(lambda key, habits: speeds.get(key, 110.0), usual) == {**usual, "attention": "eager"}


def test_bf16_is_not_tried_where_it_is_slower():
    usual, tried = usual_habits(bf16=False), []
    found = fastest_habits(lambda key, habits: tried.append(key) or float(habits["bf16"]), usual)
    assert not found["bf16"]
    assert tried == ["habits", "keep_freed False", "wait PASSIVE", "attention eager"]


def test_the_short_form_has_fewer_steps_of_the_same_rows():
    short = FIRST.shortened()
    assert (short.warmup, short.steps) == (1, 3)
    assert (short.name, short.rows, short.batches) == (FIRST.name, FIRST.rows, FIRST.batches)
    assert CELLS["gpt2-large/sciq"].shortened().steps == 2
