"""A signed bundle can be tuned: what a tuning would refuse, packing refuses, with a step for the base's owner."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from artifacts import GONE, copied_folder, edit_json, packed
from offsite.config import PackSpec
from offsite.errors import IncompatibleError, OffsiteError, StorageError
from offsite.model_owner.plan import plan_pack
from offsite.models.tokenizer_files import tokenizer_problems
from offsite.protocol.artifacts import Base
from tiny import MakeBase, Parties, tiny_tokenizer, tiny_vision_base

Spoil = Callable[[Path], None]
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"


def no_end_token(base: Path) -> None:
    edit_json(base / "tokenizer_config.json", eos_token=GONE)
    (base / "special_tokens_map.json").unlink(missing_ok=True)


def no_tokenizer(base: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (base / name).unlink(missing_ok=True)


def broken_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text()[:-200])


def tokenizer_that_is_no_tokenizer(base: Path) -> None:
    edit_json(base / "tokenizer.json", model={"type": "BPE"})


def tokens_beyond_the_embeddings(base: Path) -> None:
    content = json.loads((base / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["quick"] = vocabulary.pop(next(token for token in reversed(vocabulary))) + 1000
    content["model"]["merges"] = []
    (base / "tokenizer.json").write_text(json.dumps(content))


def end_token_beyond_the_embeddings(base: Path) -> None:
    content = json.loads((base / "tokenizer.json").read_text())
    for entry in content["added_tokens"]:
        entry["id"] += 1000 if entry["content"] == "</s>" else 0
    (base / "tokenizer.json").write_text(json.dumps(content))


def tokenizer_of_another_model(base: Path) -> None:
    edit_json(base / "config.json", bos_token_id=11, eos_token_id=12)


def template_with_a_syntax_error(base: Path) -> None:
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }")


def template_that_refuses(base: Path) -> None:
    (base / "chat_template.jinja").write_text("{{ raise_exception('only for tools') }}")


def template_without_the_answer(base: Path) -> None:
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")


def template_that_names_what_there_is_not(base: Path) -> None:
    (base / "chat_template.jinja").write_text("{{ messages[0].content.nothing.at.all }}")


def generation_settings_that_do_not_load(base: Path) -> None:
    edit_json(base / "generation_config.json", max_new_tokens=0)


def rotary_settings_that_do_not_load(base: Path) -> None:
    edit_json(base / "config.json", rope_parameters={"rope_type": "nothing like it", "rope_theta": 1e4})


TEXT: dict[Spoil, str] = {
    no_end_token: "eos_token",
    no_tokenizer: "copy the tokenizer's files",
    broken_tokenizer: "copy the tokenizer's files",
    tokenizer_that_is_no_tokenizer: "copy the tokenizer's files",
    tokens_beyond_the_embeddings: "copy the tokenizer's files",
    end_token_beyond_the_embeddings: "copy the tokenizer's files",
    tokenizer_of_another_model: "copy the tokenizer's files",
    template_with_a_syntax_error: "correct chat_template.jinja",
    template_that_refuses: "correct chat_template.jinja",
    template_without_the_answer: "correct chat_template.jinja",
    template_that_names_what_there_is_not: "correct chat_template.jinja",
    generation_settings_that_do_not_load: "generation_config.json",
    rotary_settings_that_do_not_load: "config.json",
}
FROM_FILES = (
    no_end_token,
    no_tokenizer,
    broken_tokenizer,
    tokens_beyond_the_embeddings,
    end_token_beyond_the_embeddings,
    tokenizer_of_another_model,
)


@pytest.fixture
def spoilt(base_of: MakeBase, tmp_path: Path) -> Callable[[Spoil], Path]:
    def make(spoil: Spoil) -> Path:
        base = copied_folder(base_of("llama", 3), tmp_path / "base")
        spoil(base)
        return base

    return make


def refused(base: Path, out: Path, parties: Parties, **settings: Any) -> OffsiteError:
    with pytest.raises((IncompatibleError, StorageError)) as caught:
        packed(base, out, parties, **settings)
    assert not out.exists()
    assert not list(out.parent.glob(".*.tmp"))
    assert not (parties.owner.folder / "ledger.sqlite").exists()
    return caught.value


@pytest.mark.parametrize("spoil", TEXT)
def test_what_a_tuning_would_refuse_is_not_signed(
    spoil: Spoil, spoilt: Callable[[Spoil], Path], parties: Parties, tmp_path: Path
) -> None:
    base = spoilt(spoil)
    error = refused(base, tmp_path / "bundle", parties)
    assert TEXT[spoil] in (error.next_step or "")
    assert str(base) in str(error)
    assert "owner" not in (error.next_step or "")  # who reads it is the owner


@pytest.mark.parametrize("spoil", FROM_FILES)
def test_a_plan_refuses_what_files_show(
    spoil: Spoil, spoilt: Callable[[Spoil], Path], parties: Parties, tmp_path: Path
) -> None:
    spec = PackSpec(bottom=1, top=1, keep=1, heal="none")
    with pytest.raises((IncompatibleError, StorageError)):
        plan_pack(Base(spoilt(spoil)), tmp_path / "bundle", "hospital", spec, parties.owner)


def test_the_steps_help(spoilt: Callable[[Spoil], Path], parties: Parties, tmp_path: Path) -> None:
    base = spoilt(no_end_token)
    edit_json(base / "tokenizer_config.json", eos_token="</s>")
    packed(base, tmp_path / "named", parties)
    (base / "tokenizer.json").write_text("{")
    tiny_tokenizer(base)
    packed(base, tmp_path / "copied", parties)
    template_with_a_syntax_error(base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    packed(base, tmp_path / "corrected", parties)
    (base / "chat_template.jinja").unlink()
    packed(base, tmp_path / "taken-out", parties)


def test_a_special_token_of_pictures_may_have_no_embedding(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """As <image_soft_token> in the tokenizer of Gemma 3's models for text alone."""
    base = copied_folder(base_of("llama", 3), tmp_path / "base")
    content = json.loads((base / "tokenizer.json").read_text())
    known = json.loads((base / "config.json").read_text())["vocab_size"]
    content["added_tokens"].append({**content["added_tokens"][0], "content": "<image>", "id": known, "special": True})
    (base / "tokenizer.json").write_text(json.dumps(content))
    packed(base, tmp_path / "bundle", parties)


def test_an_end_token_of_its_own_is_no_other_model(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """Models that were tuned for chat end with another token than their config says."""
    base = copied_folder(base_of("llama", 3), tmp_path / "base")
    edit_json(base / "config.json", eos_token_id=17)
    packed(base, tmp_path / "bundle", parties)


def test_tokens_of_a_unigram_model_and_of_separate_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", 0.0], ["b", 0.0], ["</s>", 0.0]]}}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert tokenizer_problems(tmp_path, {"vocab_size": 3}) == {}
    (beyond,) = tokenizer_problems(tmp_path, {"vocab_size": 2})["numbers"]
    assert beyond == "token '</s>' is number 2, the model knows 0 to 1"
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "</s>": 1}))
    decoder = {"2": {"content": "<x>", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert tokenizer_problems(tmp_path, {"vocab_size": 2})["numbers"] == [
        "token '<x>' is number 2, the model knows 0 to 1"
    ]


def test_a_loss_that_is_not_finite(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = copied_folder(base_of("llama", 3), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 3e38  # finite, and its products are not
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    error = refused(base, tmp_path / "bundle", parties)
    assert "not finite" in error.what
    assert "--dtype fp32" in (error.next_step or "")


def test_other_forms_of_a_bundle_open_too(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    forms: dict[str, dict[str, Any]] = {
        "declared": {"bits": 8},
        "left-out": {"prune": 0.5, "zeros": "left-out", "heal": "refit"},
        "half": {"dtype": "bf16"},
    }
    for name, settings in forms.items():
        packed(base_of("llama", 4), tmp_path / name, parties, **{"keep": None, **settings})


def other_size(base: Path) -> None:
    edit_json(base / "preprocessor_config.json", size={"height": 24, "width": 24})


def shortest_edge(base: Path) -> None:
    edit_json(base / "preprocessor_config.json", size={"shortest_edge": 16}, do_center_crop=False)


def unknown_processor(base: Path) -> None:
    edit_json(base / "preprocessor_config.json", image_processor_type="NoSuchImageProcessor")


def no_processor(base: Path) -> None:
    (base / "preprocessor_config.json").unlink()


@pytest.mark.parametrize("spoil", [other_size, shortest_edge, unknown_processor, no_processor])
def test_an_image_processor_that_does_not_fit(spoil: Spoil, parties: Parties, tmp_path: Path) -> None:
    base = tiny_vision_base(tmp_path / "base", blocks=3)
    spoil(base)
    error = refused(base, tmp_path / "bundle", parties)
    step = error.next_step or ""
    assert "preprocessor_config.json" in step or "image processor's file into the base folder" in step
