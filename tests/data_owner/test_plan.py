"""The plan of tuning: what trains is exact, and the formulas by hand on a tiny model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from artifacts import packed
from offsite.config import TuneSpec
from offsite.data.picture_files import Picture, decode
from offsite.data_owner.plan import TunePlan, _lanes, plan_tune
from offsite.data_owner.tune import tune
from offsite.errors import UsageError
from offsite.kernels import fused_loss, memory_formulas
from offsite.kernels.cpu.tiled_attention import _TILE
from offsite.kernels.memory_formulas import Term
from offsite.storage.safetensors_files import read_header
from offsite.training.run_log import log_file
from tiny import EVERY_KIND, KINDS, Parties, tiny_base, tiny_parties, tiny_pictures, tiny_vision_base

HIDDEN, INNER = 32, 48
BLOCK = HIDDEN * (32 + 16 + 16 + 32) + 3 * HIDDEN * INNER + 2 * HIDDEN
PAIRS = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)  # inputs and outputs of a block's linear maps
KEPT = 32 + 16 + 16 + 2 * INNER + 32 + 2 * HIDDEN  # numbers of a token that a frozen block keeps


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Parties:
    return tiny_parties(tmp_path_factory.mktemp("parties"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "base", blocks=6)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "add", "completion": f" {i}"}) + "\n" for i in range(20)))
    return file


def terms(plan: TunePlan, phase: str) -> dict[str, Term]:
    (found,) = (one for one in plan.phases if one.name == phase)
    return {term.name: term for term in found.terms}


@pytest.mark.parametrize("method", ["lora", "full", "bottleneck"])
def test_what_trains_is_what_comes_back(base: Path, tmp_path: Path, parties: Parties, rows: Path, method: Any) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    spec = TuneSpec(method=method, rank=4, width=5, max_steps=1, batch_size=2)
    plan = plan_tune(bundle, rows, spec)
    by_hand = {"lora": 2 * 4 * PAIRS, "full": 2 * BLOCK, "bottleneck": 2 * 2 * (2 * 5 * HIDDEN + 5 + HIDDEN)}[method]
    assert plan.trained_parameters == by_hand
    returned = tune(bundle, rows, tmp_path / "return", spec, parties.data_owner)
    shapes = [entry.shape for entry in returned.manifest.tensors.values()]
    assert plan.trained_tensors == len(shapes)
    assert plan.trained_parameters == memory_formulas.part("", shapes, 1).parameters


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_of_model_can_be_planned(tmp_path: Path, parties: Parties, rows: Path, kind: str) -> None:
    bundle = packed(tiny_base(tmp_path / "base", **{"blocks": 5, **KINDS[kind]}), tmp_path / "bundle", parties)
    plan = plan_tune(bundle, rows, TuneSpec(method="full"))
    trained = sum(math.prod(entry.shape) for entry in bundle.manifest.tensors.values())
    assert plan.trained_parameters == trained
    assert sum(part.parameters for part in plan.bundle if part.name in ("bottom", "top")) == trained
    assert plan.peak.bytes > memory_formulas.TORCH_LIBRARIES


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_mixture_by_hand(tmp_path: Path, parties: Parties, rows: Path, method: Any) -> None:
    """Four experts of width 20, of which a token goes through two, and one of width 24 that it always goes through."""
    bundle = packed(tiny_base(tmp_path / "base", "qwen2_moe", 5), tmp_path / "bundle", parties)
    plan = plan_tune(bundle, rows, TuneSpec(method=method, rank=4, compute="fp32", batch_size=2))
    projected = 32 + 16 + 16 + 2 * (2 * 20 + HIDDEN) + 2 * 24 + 1
    forward = terms(plan, "forward pass and loss")["activations of the blocks"]
    assert forward.bytes == 5 * 2 * 64 * 4 * (projected + 32 + 2 * 20 + 24 + 2 * HIDDEN)
    largest = {"lora": 4 * 32, "full": 4 * 2 * 20 * HIDDEN}[method]  # a pair's matrix, a stack of gates and ups
    assert terms(plan, "writing a resume point")["one tensor's bytes"].bytes == 4 * largest
    # experts, attention and its biases, norms, router, shared expert and its gate
    assert plan.trained_tensors == {"lora": 2 * 4 * 2, "full": 2 * (4 * 3 + 4 + 3 + 2 + 1 + 3 + 1)}[method]


def test_checkpoints_take_room(base: Path, tmp_path: Path, parties: Parties, rows: Path) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    one, three = (plan_tune(bundle, rows, TuneSpec(max_steps=3, checkpoints=count)) for count in (1, 3))
    assert three.disk_bytes - one.disk_bytes == (2 + 2) * 4 * one.trained_parameters
    with pytest.raises(UsageError, match="4 checkpoints were asked for, of a run of 3 steps"):
        plan_tune(bundle, rows, TuneSpec(max_steps=3, checkpoints=4))


def test_rows_steps_and_tokens(base: Path, tmp_path: Path, parties: Parties, rows: Path) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    plan = plan_tune(bundle, rows, TuneSpec(batch_size=8, epochs=2))
    assert (plan.rows, plan.steps) == (20, 6)
    assert (plan.row_tokens, plan.micro_batch_tokens) == (64, 8 * 64)  # the context is 64, a step has 8 rows
    plan = plan_tune(bundle, rows, TuneSpec(batch_size=8, micro_batch_tokens=100, max_length=32, lanes=1))
    assert (plan.row_tokens, plan.micro_batch_tokens) == (32, 100)
    plan = plan_tune(bundle, rows, TuneSpec(micro_batch_tokens=1, lanes=1))  # a row goes alone
    assert plan.micro_batch_tokens == 64


def test_a_text_is_counted_in_its_blocks(base: Path, tmp_path: Path, parties: Parties) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    text = tmp_path / "book.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    spec = TuneSpec(batch_size=2, checkpoints=2, max_length=32, rank=4)
    plan = plan_tune(bundle, text, spec)
    tune(bundle, text, tmp_path / "return", spec, parties.data_owner)
    start = json.loads(log_file(tmp_path / "return").read_text().splitlines()[1])
    assert (plan.rows, plan.steps) == (start["rows"], start["steps"])
    assert plan.rows > 2


def test_lanes_hold_a_micro_batch_each(base: Path, tmp_path: Path, parties: Parties, rows: Path) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    usual: dict[str, Any] = {"method": "full", "batch_size": 8, "micro_batch_tokens": 64, "compute": "bf16"}
    one, three = (plan_tune(bundle, rows, TuneSpec(**usual, lanes=lanes)) for lanes in (1, 3))
    assert (one.micro_batch_tokens, three.micro_batch_tokens) == (64, 192)  # rows are as long as that
    shared = plan_tune(bundle, rows, TuneSpec(**usual | {"micro_batch_tokens": 400}, lanes=3))
    assert shared.micro_batch_tokens == 400
    for name in ("forward pass and loss", "backward pass"):
        for term in ("activations of the blocks", "logits of one chunk", "gradients of micro-batches"):
            if term in terms(one, name):
                assert terms(three, name)[term].bytes == 3 * terms(one, name)[term].bytes
    for settings in ({"tune_head": True}, {"device": "cuda"}):
        assert _lanes(TuneSpec.model_validate({"lanes": 4} | settings)) == 1
    assert _lanes(TuneSpec(lanes=4)) == 4
    whole = plan_tune(bundle, rows, TuneSpec(**usual | {"batch_size": 1}, lanes=3))
    assert whole.micro_batch_tokens == 64  # a step of one micro-batch needs one lane


def test_memory_by_hand(base: Path, tmp_path: Path, parties: Parties, rows: Path) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    spec = TuneSpec(method="full", compute="bf16", batch_size=2)
    plan = plan_tune(bundle, rows, spec)
    trained, tokens, blocks = 2 * BLOCK, 2 * 64, 6
    forward = terms(plan, "forward pass and loss")
    assert forward["weights"].bytes == 2 * sum(part.parameters for part in plan.bundle)
    assert forward["masters in fp32"].bytes == 4 * trained
    assert forward["gradients in fp32"].bytes == 4 * trained
    assert forward["AdamW's moments"].bytes == 8 * trained
    assert forward["activations of the blocks"].bytes == blocks * tokens * 2 * KEPT
    assert forward["attention of the blocks"].bytes == blocks * tokens * 2 * 4 * 64
    assert forward["inputs of what trains"].bytes == 2 * tokens * 2 * (4 * HIDDEN + INNER)
    vocabulary = plan.bundle[0].parameters // HIDDEN
    assert forward["logits of one chunk"].bytes == tokens * vocabulary * 10
    assert terms(plan, "backward pass")["gradients of micro-batches"].bytes == 2 * trained
    assert plan.peak.bytes == max(phase.bytes for phase in plan.phases)
    assert plan.disk_bytes == 28 * trained


def test_in_fp32_the_weights_are_the_masters(base: Path, tmp_path: Path, parties: Parties, rows: Path) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    plan = plan_tune(bundle, rows, TuneSpec(method="full", compute="fp32", lanes=1))
    assert plan.compute == "fp32"
    assert "masters in fp32" not in terms(plan, "forward pass and loss")
    assert terms(plan, "backward pass")["gradients of micro-batches"].bytes == 4 * plan.trained_parameters


@pytest.mark.parametrize(
    ("compute", "given", "expected"), [("fp32", None, 512), ("bf16", None, 1024), ("fp32", 640, 640)]
)
def test_wider_numbers_run_fewer_at_once(
    base: Path, tmp_path: Path, parties: Parties, rows: Path, compute: Any, given: int | None, expected: int
) -> None:
    bundle = packed(base, tmp_path / "bundle", parties)
    spec = TuneSpec(compute=compute, micro_batch_tokens=given, batch_size=64, lanes=1)
    assert plan_tune(bundle, rows, spec).micro_batch_tokens == expected


def test_below_the_first_trained_block_nothing_is_kept(
    base: Path, tmp_path: Path, parties: Parties, rows: Path
) -> None:
    bundle = packed(base, tmp_path / "bundle", parties, bottom=0, top=1, keep=5)
    forward = terms(plan_tune(bundle, rows, TuneSpec(compute="fp32", batch_size=2)), "forward pass and loss")
    assert forward["activations of the blocks"].bytes == 1 * 2 * 64 * 4 * KEPT


def test_the_sizes_are_those_of_the_code() -> None:
    assert fused_loss.CHUNK_ELEMENTS is memory_formulas.CHUNK_ELEMENTS
    assert memory_formulas.SHORT_ATTENTION == _TILE


def test_checkpoints_of_pictures_are_refused_as_tuning_does(tmp_path: Path, parties: Parties) -> None:
    bundle = packed(tiny_vision_base(tmp_path / "base", blocks=4), tmp_path / "bundle", parties, keep=1)
    pictures = tiny_pictures(tmp_path / "set", 4)
    spec = TuneSpec(checkpoints=2, max_steps=4)
    with pytest.raises(UsageError, match="holds one checkpoint"):
        plan_tune(bundle, pictures, spec)
    with pytest.raises(UsageError, match="holds one checkpoint"):
        tune(bundle, pictures, tmp_path / "out", spec, parties.data_owner)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_pictures_are_planned_from_their_headers(tmp_path: Path, parties: Parties, method: Any) -> None:
    bundle = packed(tiny_vision_base(tmp_path / "base", "dinov2", 4), tmp_path / "bundle", parties, keep=1)
    pictures = tiny_pictures(tmp_path / "set", 4)
    (pictures / "red" / "bad.png").write_text("none")  # tuning will name it
    spec = TuneSpec(method=method, compute="fp32", batch_size=4, eval_share=0.5)
    plan = plan_tune(bundle, pictures, spec)
    config = json.loads((bundle.folder / "config.json").read_text())
    tokens, hidden = (16 // config["patch_size"]) ** 2 + 1, config["hidden_size"]
    assert (plan.rows, plan.row_tokens, plan.micro_batch_tokens) == (7, tokens, 4 * tokens)
    forward = terms(plan, "forward pass and loss")
    sizes = [decode(Picture(file.name, file, None)).nbytes for file in pictures.rglob("[0-9].png")]
    assert forward["decoded pictures"].bytes == sum(sizes)
    assert forward["pixels of what runs at once, twice"].bytes == 2 * 4 * 4 * 3 * 16 * 16
    classifier = 3 * (2 * hidden + 1)
    assert forward["classifier in fp32"].bytes == 4 * classifier
    tune(bundle, pictures, tmp_path / "out", spec.changed({"skip_bad": True}), parties.data_owner)
    returned = (tmp_path / "out").glob("*.safetensors")
    numbers = sum(math.prod(tensor.shape) for file in returned for tensor in read_header(file).values())
    assert plan.trained_parameters == numbers
    assert "logits of one chunk" not in forward
    assert "the probe, and validation" in {phase.name for phase in plan.phases}
