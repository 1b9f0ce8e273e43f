"""A head that trains with the adapter: permitted, tuned, returned, and plugged in in every form."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError

from artifacts import full_return, lora_return, packed
from model_owner.plugging_in.test_plug_in import plugged
from model_owner.test_pack import bits, logits, plain
from offsite.cli.data_owner import promise
from offsite.cli.inspect_verbs import describe
from offsite.config import EvalSpec, PlugInSpec, TuneSpec
from offsite.data_owner.plan import plan_tune
from offsite.data_owner.return_manifest import returned_tensors
from offsite.data_owner.tune import tune
from offsite.errors import PolicyError, UsageError
from offsite.evaluation.evaluate import evaluate
from offsite.model_owner.intake import intake
from offsite.model_owner.plugging_in.choose_plug_in import choose
from offsite.models.families.architectures import ARCHITECTURES
from offsite.protocol.artifacts import Base
from offsite.protocol.contents import WEIGHTS_OF
from offsite.protocol.verify import verify_return
from offsite.storage.safetensors_files import read_float32, read_header
from offsite.training.run_log import run_folder
from tiny import Parties, tiny_base, tiny_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SMALL: dict[str, Any] = {"compute": "fp32", "device": "cpu", "threads": 1}
MEASURED = EvalSpec(**SMALL)
UNTIED: dict[str, dict[str, Any]] = {
    "llama": {"tied": False}, "gpt2": {"tied": False}, "gpt_neox": {}, "phi": {},
}  # fmt: skip  # gpt_neox calls its head another name in files, that of phi has a bias


def spec_of(**settings: Any) -> TuneSpec:
    chosen = {"rank": 4, "lr": 5e-3, "max_steps": 4, "batch_size": 4, "tune_head": True, **SMALL}
    return TuneSpec.model_validate({**chosen, **settings})


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tiny_rows(tmp_path / "rows.jsonl", 8)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", UNTIED)
def test_every_form_computes_what_was_tuned(
    tmp_path: Path, parties: Parties, rows: Path, family: Any, method: Any
) -> None:
    """The bundle keeps every block, so base and plug-in must compute what bundle and return do."""
    base = tiny_base(tmp_path / "base", family, 3, **UNTIED[family])
    bundle = packed(base, tmp_path / "bundle", parties, permit_head=True)
    spec = spec_of(method=method, checkpoints=2)
    returned = tune(bundle, rows, tmp_path / "return", spec, parties.data_owner)
    assert "and the model's output head" in promise(bundle.manifest, spec)
    assert describe(bundle, parties.owner)["may_come_back"]["head"]
    assert describe(returned, parties.data_owner)["head"]
    assert verify_return(returned.folder, parties.owner, bundle.manifest).manifest.head
    assert returned.manifest.tensors == {
        name: entry.model_copy(update={"dtype": "F32"})
        for name, entry in returned_tensors(bundle.manifest, spec).items()
    }
    head = ARCHITECTURES[family].head
    held, earlier = (read_header(returned.folder / name) for name in (WEIGHTS_OF[method], "checkpoint-1.safetensors"))
    heads = held.keys() & {
        head,
        *(f"base_model.model.lm_head.{kind}" for kind in ("weight", "bias")),
        "lm_head.bias",
    }
    assert len(heads) == (2 if family == "phi" else 1)
    for name in heads:  # it has trained, at every step
        shipped = read_float32(read_header(bundle.folder / "model.safetensors")[f"{head[:-6]}{name.split('.')[-1]}"])
        assert not np.array_equal(read_float32(earlier[name]), shipped)
        assert not np.array_equal(read_float32(earlier[name]), read_float32(held[name]))
    tuned = evaluate(bundle.folder, rows, MEASURED, adapter=returned.folder).loss
    assert tuned < evaluate(base, rows, MEASURED).loss - 0.1
    merged = plugged(base, returned.folder, tmp_path / "merged", parties, **{"as": "merged"})
    assert evaluate(merged.folder, rows, MEASURED).loss == pytest.approx(tuned, rel=1e-5)
    if method == "lora":
        adapter = plugged(base, returned.folder, tmp_path / "adapter", parties, **{"as": "adapter"})
        assert evaluate(base, rows, MEASURED, adapter=adapter.folder).loss == pytest.approx(tuned, rel=1e-6)


def test_an_adapter_with_a_head_is_an_ordinary_peft_folder(tmp_path: Path, parties: Parties) -> None:
    base = tiny_base(tmp_path / "base", "llama", 3, tied=False)
    bundle = packed(base, tmp_path / "bundle", parties, permit_head=True)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner, head=0.1)
    adapter = plugged(base, returned.folder, tmp_path / "adapter", parties, strength=0.5)
    assert adapter.manifest.form == "adapter"
    with warnings.catch_warnings():  # missing or unexpected keys are warnings there
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        adapted = PeftModel.from_pretrained(plain(base), str(adapter.folder))
    before = plain(base).lm_head.weight
    whole = read_float32(read_header(returned.folder / "adapter_model.safetensors")["base_model.model.lm_head.weight"])
    found = adapted.get_output_embeddings().weight
    torch.testing.assert_close(found, before + 0.5 * (torch.from_numpy(whole.copy()) - before))
    merged = plugged(base, returned.folder, tmp_path / "merged", parties, strength=0.5, **{"as": "merged"})
    torch.testing.assert_close(logits(plain(merged.folder)), logits(adapted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_untouched_head_gives_the_base_back(tmp_path: Path, parties: Parties, method: str, dtype: Any) -> None:
    base = tiny_base(tmp_path / "base", "llama", 3, tied=False)
    bundle = packed(base, tmp_path / "bundle", parties, permit_head=True, dtype=dtype)
    if method == "lora":
        returned = lora_return(bundle, tmp_path / "return", parties.data_owner, b=0.0, head=0.0)
    else:
        returned = full_return(bundle, tmp_path / "return", parties.data_owner, head=0.0)
    made = plugged(base, returned.folder, tmp_path / "plugged", parties, **{"as": "merged"})
    assert bits(made.folder) == bits(base)


def test_an_interrupted_tuning_goes_on_bit_for_bit(tmp_path: Path, parties: Parties, rows: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama", 3, tied=False)
    bundle = packed(base, tmp_path / "bundle", parties, permit_head=True)
    whole = tune(bundle, rows, tmp_path / "whole", spec_of(), parties.data_owner)

    def interrupt(event: Any) -> None:
        if event.stage == "tuning" and event.done == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        tune(bundle, rows, out, spec_of(), parties.data_owner, progress=interrupt)
    assert run_folder(out).is_dir()
    resumed = tune(bundle, rows, out, spec_of(), parties.data_owner, resume=True)
    file = WEIGHTS_OF["lora"]
    assert (resumed.folder / file).read_bytes() == (whole.folder / file).read_bytes()


def test_a_candidate_holds_its_head(tmp_path: Path, parties: Parties, rows: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama", 3, tied=False)
    bundle = packed(base, tmp_path / "bundle", parties, permit_head=True)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner, b=0.0, head=0.1).folder
    for form in ("adapter", "merged"):
        spec = PlugInSpec.model_validate({"as": form, "strength": 0.5, "again": True})
        found = choose(Base(base), intake(returned, parties.owner), rows, spec, MEASURED, parties.owner)
        made = plugged(base, returned, tmp_path / form, parties, strength=0.5, **{"as": form}).folder
        expected = evaluate(base, rows, MEASURED, adapter=made) if form == "adapter" else evaluate(made, rows, MEASURED)
        assert found.candidates[0].loss == pytest.approx(expected.loss, rel=1e-6)
        assert abs(found.base_loss - expected.loss) > 1e-4


def test_what_is_not_permitted_is_refused_before_any_work(tmp_path: Path, parties: Parties, rows: Path) -> None:
    tied = tiny_base(tmp_path / "tied", "llama", 3)
    with pytest.raises(UsageError, match="no head to permit") as caught:
        packed(tied, tmp_path / "bundle", parties, permit_head=True)
    assert "is the input embedding" in caught.value.reasons[0]
    untied = tiny_base(tmp_path / "untied", "llama", 3, tied=False)
    bundle = packed(untied, tmp_path / "bundle", parties)
    with pytest.raises(PolicyError) as refused:
        tune(bundle, rows, tmp_path / "return", spec_of(), parties.data_owner)
    assert "the bundle does not permit the head" in refused.value.reasons[0]
    with pytest.raises(ValidationError, match="cannot be used with bottlenecks"):
        spec_of(method="bottleneck")
    assert not (tmp_path / "return").exists()
    assert not run_folder(tmp_path / "return").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_plan_counts_the_head(tmp_path: Path, parties: Parties, rows: Path, method: Any) -> None:
    base = tiny_base(tmp_path / "base", "llama", 3, tied=False)
    bundle = packed(base, tmp_path / "bundle", parties, permit_head=True)
    home, out = parties.data_owner, tmp_path / "return"
    plans = [
        plan_tune(bundle, rows, out, spec_of(method=method, tune_head=on, compute="bf16"), home)[0]
        for on in (False, True)
    ]
    without, with_it = ({amount.name: amount.bytes for amount in plan.memory[0].amounts} for plan in plans)
    numbers = 320 * 32
    assert plans[1].trained_parameters - plans[0].trained_parameters == numbers
    for name, bytes_each in (("master weights", 4), ("gradients", 4), ("optimiser moments", 8)):
        assert with_it[f"{name} in fp32"] - without[f"{name} in fp32"] == bytes_each * numbers
    assert with_it.get("adapter in bf16") == without.get("adapter in bf16")
