"""What `prepare` replaces on each kind of device, and that the report says so."""

import json

import pytest
import torch

from offsite.config import TuneSpec
from offsite.data_owner.methods.lora import attach
from offsite.kernels import Piece, Report, prepare, prepare_adapters
from offsite.kernels.cpu import compiled_kernels as compiled
from offsite.models.loading import load_model
from tiny import tiny_base, tiny_bundle, tiny_parties

CPU = torch.device("cpu")


def loaded(folder, family="llama", dtype=torch.float32, **settings):
    return load_model(tiny_base(folder, blocks=2, family=family, **settings), dtype=dtype, device=CPU)


def pieces_of(report):
    return {piece.name: piece for piece in report.pieces}


def test_a_cpu_reports_every_piece_and_why(tmp_path):
    report = prepare(loaded(tmp_path / "llama"), CPU, torch.float32)
    pieces = pieces_of(report)
    assert report.backend == "cpu"
    assert {name: piece.count for name, piece in pieces.items() if name not in ("freed memory kept",)} == {
        "bf16 as compute dtype": 0,
        "RMS norms": 5,
        "gated MLPs": 2,
        "GELU activations": 0,
        "attention": 2,
        "compiled kernels": 0,
    }
    assert all(piece.reason for piece in report.pieces)
    assert json.loads(json.dumps(report.as_dict()))["pieces"][1] == vars(pieces["RMS norms"])


def test_a_model_that_chooses_its_attention_by_name_keeps_it(tmp_path):
    pieces = pieces_of(prepare(loaded(tmp_path / "falcon", "falcon"), CPU, torch.float32))
    assert pieces["attention"] == Piece("attention", 0, "the model's own code chooses its attention by name")


def test_why_nothing_compiled_runs_is_reported(tmp_path, monkeypatch):
    model = loaded(tmp_path / "base", dtype=torch.bfloat16)
    monkeypatch.setenv("OFFSITE_KERNELS", "0")
    monkeypatch.setattr(compiled, "level", compiled.level.__wrapped__)
    pieces = pieces_of(prepare(model, CPU, torch.bfloat16))
    assert pieces["compiled kernels"].reason == "switched off by OFFSITE_KERNELS=0"


def test_compiled_kernels_run_in_bf16_alone(tmp_path):
    level, reason = compiled.level()
    if not level:
        pytest.skip(reason)
    model = loaded(tmp_path / "base", dtype=torch.bfloat16)
    assert pieces_of(prepare(model, CPU, torch.bfloat16))["compiled kernels"] == Piece("compiled kernels", 1, reason)
    assert pieces_of(prepare(model, CPU, torch.float32))["compiled kernels"].count == 0


@pytest.mark.parametrize(
    ("tiles", "dtype", "reason"),
    [
        (True, torch.bfloat16, "this CPU's matrix tiles (AMX) multiply bf16"),
        (True, torch.float32, "fp32 was asked for; this CPU's matrix tiles (AMX) multiply bf16"),
        (False, torch.float32, "this CPU emulates bf16, slower than fp32"),
        (False, torch.bfloat16, "bf16 was asked for; this CPU emulates bf16, slower than fp32"),
    ],
)
def test_the_compute_dtype_is_reported_with_what_speaks_for_it(tmp_path, monkeypatch, tiles, dtype, reason):
    monkeypatch.setattr("offsite.kernels.runtime.has_matrix_tiles", lambda: tiles)
    monkeypatch.setattr("offsite.kernels.runtime.has_bf16_vectors", lambda: False)
    report = prepare(loaded(tmp_path / "base", dtype=dtype), CPU, dtype)
    assert pieces_of(report)["bf16 as compute dtype"] == Piece(
        "bf16 as compute dtype", int(dtype == torch.bfloat16), reason
    )


def test_a_device_without_a_backend_runs_what_the_library_wrote(tmp_path):
    model = loaded(tmp_path / "base")
    before = [type(module) for module in model.modules()]
    report = prepare(model, torch.device("meta"), torch.float32)
    assert report.backend == "reference"
    assert [type(module) for module in model.modules()] == before
    assert "there is no backend for meta" in report.in_words()


def test_adapters_are_replaced_and_reported(tmp_path):
    bundle = tiny_bundle(tiny_base(tmp_path / "b", blocks=4), tmp_path / "bundle", tiny_parties(tmp_path), keep=1)
    model = load_model(bundle.folder, dtype=torch.float32, device=CPU)
    report = prepare(model, CPU, torch.float32)
    (none,) = prepare_adapters(model, CPU)
    assert none.count == 0
    pairs = attach(model, bundle.manifest, TuneSpec(rank=3))
    (other,) = prepare_adapters(model, torch.device("cuda"))
    assert (other.count, other.reason) == (0, "as PEFT runs them")
    (replaced,) = prepare_adapters(model, CPU)
    assert replaced.count == len(pairs) // 2
    report = report.with_pieces(none).with_pieces(replaced)
    assert [piece for piece in report.pieces if piece.name == replaced.name] == [replaced]


def test_in_words_only_what_could_be_otherwise_is_listed():
    pieces = (
        Piece("a", 2, "same"),
        Piece("b", 0, "not installed"),
        Piece("c", 0, "the model has none of a known form"),
    )
    assert Report("cpu", pieces).in_words() == "kernels: cpu; not in use: b (not installed)"
    assert Report("cpu", pieces[:1]).in_words() == "kernels: cpu; all in use"
