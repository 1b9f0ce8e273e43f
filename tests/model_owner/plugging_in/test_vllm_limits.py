"""What `inspect --for vllm` says of vLLM's limits, and several plug-ins on one loaded base, chosen per request."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from artifacts import bottleneck_return, full_return, lora_return, packed
from offsite.cli import main
from offsite.config import PlugInSpec
from offsite.model_owner.intake import intake
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.model_owner.plugging_in.vllm_limits import lora_problems, max_rank, serve_command, vllm_limits
from offsite.models.families.architectures import ARCHITECTURES
from offsite.protocol.artifacts import Base, PlugIn, Return
from tiny import MakeBase, Parties

# peft 0.21 asks transformers 5.23 by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Plug = Callable[..., PlugIn]
LORA = {"r": 8, "target_modules": ["model.layers.0.self_attn.q_proj"], "modules_to_save": None, "bias": "none"}


def plugged(base: Path, returned: Return, out: Path, parties: Parties, **spec: Any) -> PlugIn:
    settings = PlugInSpec.model_validate({"again": True, **spec})
    return plug_in(Base(base), intake(returned.folder, parties.owner), out, settings, parties.owner)


def test_an_adapter_within_the_limits_has_a_command(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of("llama")
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner, rank=12)
    limits = vllm_limits(plugged(base, returned, tmp_path / "my plug-in", parties))
    assert limits.problems == ()
    assert limits.command is not None
    words = shlex.split(limits.command)
    assert words[:6] == ["vllm", "serve", "BASE", "--enable-lora", "--max-lora-rank", "16"]
    assert words[-2:] == ["--lora-modules", f"my plug-in={tmp_path / 'my plug-in'}"]
    assert "F32" in " ".join(limits.notes)
    merged = vllm_limits(plugged(base, returned, tmp_path / "merged", parties, as_="merged"))
    assert merged.command == shlex.join(["vllm", "serve", str(tmp_path / "merged")])


def test_a_tuned_head_a_bottleneck_and_another_family_do_not_fit(
    base_of: MakeBase, parties: Parties, tmp_path: Path
) -> None:
    base = base_of("llama", tied=False)
    bundle = packed(base, tmp_path / "bundle", parties, permit_head=True)
    head = lora_return(bundle, tmp_path / "head", parties.data_owner, head=0.1)
    limits = vllm_limits(plugged(base, head, tmp_path / "plugged-head", parties))
    assert limits.command is None
    assert "modules_to_save has lm_head" in " ".join(limits.problems)
    bottleneck = bottleneck_return(bundle, tmp_path / "bottleneck", parties.data_owner)
    assert vllm_limits(plugged(base, bottleneck, tmp_path / "plugged-bottleneck", parties)).command is None
    other = base_of("gpt2")
    bundle = packed(other, tmp_path / "other", parties)
    returned = lora_return(bundle, tmp_path / "of-other", parties.data_owner)
    assert "GPT2LMHeadModel without LoRA" in vllm_limits(plugged(other, returned, tmp_path / "p", parties)).problems[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"r": 512}, None),
        ({"r": 513}, "at most 512"),
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["model.layers.0.mlp.experts.0.w1"]}, "expert"),
        ({"target_modules": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]}, "1 more targets"),
        ({"target_modules": ["model.layers.0.mlp.gate_proj"]}, None),
    ],
)
def test_each_limit_is_checked(change: dict[str, Any], words: str | None) -> None:
    problems = lora_problems({**LORA, **change})
    assert len(problems) == (words is not None)
    assert words is None or words in problems[0]


def test_the_command_has_the_next_allowed_rank_and_survives_the_shell() -> None:
    assert [max_rank([rank]) for rank in (1, 2, 8, 9, 33, 512, 600)] == [1, 8, 8, 16, 64, 512, None]
    words = shlex.split(serve_command([Path("/a/x=1"), Path("/b/y")], [4, 24], base="my base"))
    assert words[2] == "my base"
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert words[words.index("--max-loras") + 1] == "2"
    assert json.loads(words[-2]) == {"name": "x=1", "path": "/a/x=1"}
    assert words[-1] == "y=/b/y"


def test_every_language_family_of_the_table_is_known_to_be_served_or_not() -> None:
    from offsite.model_owner.plugging_in.vllm_limits import WITH_LORA, WITHOUT_LORA

    classes = {family.class_name for family in ARCHITECTURES.values() if family.vision is None}
    assert classes <= WITH_LORA | WITHOUT_LORA
    assert not WITH_LORA & WITHOUT_LORA


def test_inspect_prints_it_and_refuses_other_artifacts(
    base_of: MakeBase, parties: Parties, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_of("llama")
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = full_return(bundle, tmp_path / "return", parties.data_owner)
    made = plugged(base, returned, tmp_path / "plugged", parties)
    home = ["--home", str(parties.owner.folder)]
    assert main(["inspect", str(made.folder), "--for", "vllm", "--json", *home]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["vllm"]["can_serve"] is True
    assert shown["vllm"]["command"] == shlex.join(["vllm", "serve", str(made.folder)])
    assert main(["inspect", str(bundle.folder), "--for", "vllm", *home]) == 2
    assert main(["inspect", str(made.folder), "--for", "ollama", *home]) == 2
    (made.folder / "config.json").write_text("{}")
    capsys.readouterr()
    assert main(["inspect", str(made.folder), "--for", "vllm", "--json", *home]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["verified"] is False
    assert "vllm" not in shown


def test_three_plug_ins_on_one_base_are_chosen_per_request(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """The worked example of docs/model-owner.md: PEFT holds the base once, and each row names its adapter."""
    base = base_of("llama")
    bundle = packed(base, tmp_path / "bundle", parties)
    folders = {}
    for seed, name in enumerate(("legal", "medical", "support")):
        returned = lora_return(bundle, tmp_path / f"return-{name}", parties.data_owner, seed=seed, b=0.2)
        folders[name] = plugged(base, returned, tmp_path / name, parties).folder

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    ids = torch.tensor([[1, 5, 9, 40]])
    with torch.no_grad():
        alone = {
            name: PeftModel.from_pretrained(load(), folder)(input_ids=ids).logits for name, folder in folders.items()
        }
        alone["__base__"] = load()(input_ids=ids).logits
        served = PeftModel.from_pretrained(load(), folders["legal"], adapter_name="legal")
        for name in ("medical", "support"):
            served.load_adapter(folders[name], adapter_name=name)
        served.eval()
        for name in ("support", "legal", "medical"):  # one request after the other
            served.set_adapter(name)
            torch.testing.assert_close(served(input_ids=ids).logits, alone[name])
        names = ["medical", "__base__", "support", "legal"]  # requests of one batch
        together = served(input_ids=ids.expand(4, -1), adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(together[row : row + 1], alone[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone["legal"], alone["medical"], atol=1e-3)
