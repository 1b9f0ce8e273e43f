import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from offsite.config import EvalSpec, TuneSpec
from offsite.data.batches import collate
from offsite.data.read_rows import read_rows
from offsite.data.tokens import encode
from offsite.evaluation.image_scores import evaluate_images
from offsite.model_owner.base_model import open_base
from offsite.models.image_encoder import BIAS, WEIGHT
from offsite.models.loading import load_model
from offsite.models.tokenizers import load_tokenizer
from offsite.progress import Event
from offsite.protocol.artifacts import Base
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_float32
from offsite.study.all_weights_tuning import all_weights_on_text
from offsite.study.full_fine_tuning import full_fine_tuning
from offsite.training.label_losses import label_losses
from tiny import tiny_base, tiny_pictures, tiny_rows, tiny_vision_base

CPU = torch.device("cpu")
KINDS = [
    {"family": "llama", "tied": True},
    {"family": "llama", "tied": False},
    {"family": "gpt2"},
    {"family": "opt", "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    {"family": "bloom"},
    {"family": "mixtral"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind['family']}{kind.get('tied', '')}")
def test_every_weight_has_the_gradient_of_the_whole_model(tmp_path: Path, kind: dict[str, object]) -> None:
    """Against transformers' own loss through its own head, embeddings, norms and tied heads included."""
    base = tiny_base(tmp_path / "base", blocks=2, **kind)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(base)
    rows = read_rows(tiny_rows(tmp_path / "rows.jsonl", 3))
    examples = encode(rows, tokenizer, source=tmp_path, max_length=64).examples
    batch = collate(examples)
    model = load_model(base, dtype=torch.float32, device=CPU)
    tuning = all_weights_on_text(model, open_base(Base(base)).family, examples, (), TuneSpec())
    total, _ = label_losses(tuning.task.network, batch)
    total.backward()
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
    logits = reference(input_ids=ids, attention_mask=mask, use_cache=False).logits.flatten(0, 1)
    picked = logits[torch.from_numpy(batch.places)]
    torch.nn.functional.cross_entropy(picked, torch.from_numpy(batch.targets), reduction="sum").backward()
    expected = dict(reference.named_parameters())
    assert set(tuning.weights.masters) == set(expected)
    for name, master in tuning.weights.masters.items():
        torch.testing.assert_close(master.grad, expected[name].grad, rtol=2e-4, atol=2e-4, msg=name)


def test_every_tensor_moves_and_the_result_is_a_checkpoint(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", blocks=3, tied=False)
    rows = tiny_rows(tmp_path / "rows.jsonl", 12)
    spec = TuneSpec(max_steps=4, batch_size=6, lr=1e-2, weight_decay=0.1, compute="fp32", gradient_checkpointing=True)
    tuned = full_fine_tuning(Base(base), rows, tmp_path / "tuned", spec, eval_data=rows)
    before, after = open_checkpoint(base).tensors, open_checkpoint(tuned.folder).tensors
    assert set(before) == set(after)
    old = load_model(base, dtype=torch.float32, device=CPU)
    new = dict(load_model(tuned.folder, dtype=torch.float32, device=CPU).named_parameters())
    for name, parameter in old.named_parameters():
        assert not torch.equal(parameter, new[name]), name
    assert load_tokenizer(tuned.folder).eos_token == load_tokenizer(base).eos_token
    log = [json.loads(line) for line in (tmp_path / "tuned.log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in log if record["event"] == "step"]
    assert losses[-1] < losses[0]
    assert log[-1]["event"] == "validation"
    assert not (tmp_path / "tuned.run").exists()


def test_what_decays_is_matrices(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "bloom", blocks=2)
    model = load_model(base, dtype=torch.float32, device=CPU)
    tuning = all_weights_on_text(model, open_base(Base(base)).family, (), (), TuneSpec())
    shapes = {name: parameter.dim() for name, parameter in model.named_parameters()}
    assert "transformer.word_embeddings_layernorm.weight" not in tuning.weights.decayed
    assert {name for name, dims in shapes.items() if dims == 2} == set(tuning.weights.decayed)


@pytest.mark.parametrize(("end", "step"), [(KeyboardInterrupt, 1), (KeyboardInterrupt, 3), (RuntimeError, 5)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2 has dropout everywhere
def test_an_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, family: str, end: type[BaseException], step: int
) -> None:
    base = Base(tiny_base(tmp_path / "base", family, blocks=2))
    rows = tiny_rows(tmp_path / "rows.jsonl", 12)
    spec = TuneSpec(max_steps=6, batch_size=4, save_every=2, compute="fp32", weight_decay=0.1)
    _assert_resumed_is_the_same(base, rows, tmp_path, spec, end, step)


def test_an_interrupted_run_on_pictures_goes_on_bit_for_bit(tmp_path: Path) -> None:
    base = Base(tiny_vision_base(tmp_path / "base", "dinov2", 3))
    pictures = tiny_pictures(tmp_path / "pictures", 4)
    spec = TuneSpec(lr=1e-3, max_steps=5, batch_size=5, save_every=2, compute="fp32", device="cpu", threads=1)
    _assert_resumed_is_the_same(base, pictures, tmp_path, spec, KeyboardInterrupt, 3)


def _assert_resumed_is_the_same(
    base: Base, data: Path, folder: Path, spec: TuneSpec, end: type[BaseException], step: int
) -> None:
    def stop(event: Event) -> None:
        if event.stage == "tuning" and event.done == step:
            raise end

    with pytest.raises(end):
        full_fine_tuning(base, data, folder / "parts", spec, progress=stop)
    parts = full_fine_tuning(base, data, folder / "parts", spec, resume=True)
    entire = full_fine_tuning(base, data, folder / "entire", spec)
    name = "model.safetensors"
    assert (parts.folder / name).read_bytes() == (entire.folder / name).read_bytes()


@pytest.mark.parametrize("kind", ["dinov2", "clip tower", "beit, shared relative positions, class token"])
def test_an_encoder_becomes_a_classifier(tmp_path: Path, kind: str) -> None:
    """All that the head depends on moves; a mask token and a norm that it does not see stay as they are."""
    base = tiny_vision_base(tmp_path / "base", kind, 3)
    pictures = tiny_pictures(tmp_path / "pictures", 4)
    spec = TuneSpec(lr=1e-3, max_steps=8, batch_size=6, compute="fp32", device="cpu", threads=1, augment=False)
    tuned = full_fine_tuning(Base(base), pictures, tmp_path / "tuned", spec)
    family = open_base(Base(base)).family
    before = {f"{family.vision.prefix}.{name}": stored for name, stored in open_base(Base(base)).tensors.items()}
    after = open_checkpoint(tuned.folder).tensors
    assert after.keys() == before.keys() | {WEIGHT, BIAS}
    same = {name for name, stored in before.items() if (read_float32(stored) == read_float32(after[name])).all()}
    unseen = {"clip_vision_model": {"post_layernorm.weight", "post_layernorm.bias"}}.get(
        family.model_type, {"embeddings.mask_token"}
    )
    assert same == {f"{family.vision.prefix}.{name}" for name in unseen}
    exact = EvalSpec(compute="fp32", device="cpu", threads=1)
    probed = evaluate_images(base, pictures, exact, probe=pictures)
    assert evaluate_images(tuned.folder, pictures, exact).loss < probed.loss
