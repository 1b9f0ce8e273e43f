"""Checks whether vLLM can serve a plug-in, by the limits that vLLM documents. Torch-free; vLLM is not needed.

The limits are those of vLLM's sources in 2026: `vllm/config/lora.py` (ranks), `vllm/lora/peft_helper.py` (settings),
`vllm/lora/lora_model.py` (targets), and the table of models in its `docs/models/supported_models.md`.
"""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.models.families.architectures import ARCHITECTURES
from offsite.protocol.artifacts import PlugIn
from offsite.protocol.contents import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG
from offsite.storage.strict_json import strict_json

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank takes
# model classes that vLLM serves with LoRA, by its table of models
WITH_LORA = frozenset({
    "CohereForCausalLM", "Cohere2ForCausalLM", "Ernie4_5ForCausalLM", "Exaone4ForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM", "GlmForCausalLM", "GPTBigCodeForCausalLM",
    "GraniteForCausalLM", "HunYuanDenseV1ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM",
    "NemotronForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM", "OPTForCausalLM",
    "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM", "Starcoder2ForCausalLM",
})  # fmt: skip
# model classes that it serves without LoRA
WITHOUT_LORA = frozenset({
    "BloomForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM", "GPTNeoXForCausalLM",
    "OlmoeForCausalLM", "StableLmForCausalLM",
})  # fmt: skip
_BASE = "BASE"  # in the command: a plug-in does not know the base's folder


@dataclass(frozen=True)
class VllmLimits:
    """Whether vLLM can serve a plug-in."""

    problems: tuple[str, ...]  # limits that do not hold, each with what to do; empty if vLLM can serve it
    notes: tuple[str, ...]  # what to know when serving it
    command: str | None  # the shell command that serves it; None if there are problems

    @property
    def facts(self) -> dict[str, Any]:
        """The limits as values that JSON can hold."""
        return {
            "can_serve": not self.problems,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "command": self.command,
        }


def vllm_limits(plugged: PlugIn) -> VllmLimits:
    """Check a plug-in against vLLM's limits: a LoRA adapter on a served base, or a complete checkpoint.

    Args:
        plugged: the verified plug-in.

    Raises:
        StorageError: a file cannot be read.
        VerificationError: a file has changed since the plug-in was verified.
    """
    files, folder = plugged.files, plugged.folder.absolute()
    if plugged.manifest.form == "merged":
        return _merged_limits(strict_json(files.read(CONFIG)), folder)
    if ADAPTER_CONFIG not in files.names():
        return VllmLimits(("a bottleneck is no LoRA adapter, and vLLM serves no other kind",), (), None)
    family = ARCHITECTURES.get(plugged.manifest.architecture)
    config: Mapping[str, Any] = strict_json(files.read(ADAPTER_CONFIG))
    dtypes = {tensor.dtype for tensor in files.header(ADAPTER_WEIGHTS).values()}
    problems = (*_class_problems(family.class_name if family else None), *lora_problems(config))
    notes = [f"{_BASE} stands for the base's folder; more plug-ins of this base follow as further NAME=FOLDER"]
    if "F32" in dtypes:
        notes.append("the adapter is stored in F32, and vLLM rounds it to the model's dtype, or to --lora-dtype")
    command = None if problems else serve_command([folder], [int(config["r"])])
    return VllmLimits(problems, tuple(notes), command)


def lora_problems(config: Mapping[str, Any]) -> list[str]:
    """A message for each setting of a PEFT LoRA adapter that vLLM refuses; `config` is its adapter_config.json."""
    problems = []
    if max_rank([config["r"]]) is None:
        problems.append(f"rank {config['r']}: vLLM serves at most {RANKS[-1]}; plug it in with --as merged")
    if config.get("modules_to_save"):
        names = ", ".join(config["modules_to_save"])
        problems.append(f"modules_to_save has {names}, and must be empty; plug it in with --as merged")
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}, expected 'none'; plug it in with --as merged")
    if config.get("use_dora"):
        problems.append("it is a DoRA adapter, which vLLM does not serve; plug it in with --as merged")
    layers = sorted({path for path in config["target_modules"] if _is_of_mixture(path)})
    if layers:
        problems.append(
            f"{layers[0]} and {len(layers) - 1} more targets are routers or experts of a mixture, which vLLM stores in "
            "another form; plug it in with --as merged"
            if len(layers) > 1
            else f"{layers[0]} is a router or expert of a mixture, which vLLM stores in another form; plug it in with "
            "--as merged"
        )
    return problems


def max_rank(ranks: Iterable[int]) -> int | None:
    """The smallest value of --max-lora-rank that is enough for adapters of these ranks; None if none is."""
    needed = max(ranks)
    return next((rank for rank in RANKS if rank >= needed), None)


def serve_command(adapters: Iterable[Path], ranks: Iterable[int], base: str = _BASE) -> str:
    """The shell command with which vLLM serves a base with LoRA adapters, each under the name of its folder.

    Args:
        adapters: the folders of the adapters.
        ranks: their ranks, of which each has a value of --max-lora-rank that is enough.
        base: the base's folder.
    """
    folders = list(adapters)
    modules = [_module(folder) for folder in folders]
    most = [] if len(folders) == 1 else ["--max-loras", str(len(folders))]
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(max_rank(ranks)), *most, "--lora-modules"]
    return shlex.join([*words, *modules])


def _module(folder: Path) -> str:
    """A value of --lora-modules: NAME=FOLDER, or a JSON object where the path has a sign with a meaning of its own."""
    name = folder.name
    if any(sign in str(folder) for sign in "=,"):
        return json.dumps({"name": name, "path": str(folder)})
    return f"{name}={folder}"


def _is_of_mixture(path: str) -> bool:
    """Whether a linear layer is a router or an expert of a mixture of experts; `path` is its full path."""
    parts = path.split(".")
    return "experts" in parts or parts[-1] in ("gate", "router", "shared_expert_gate")


def _class_problems(class_name: str | None) -> list[str]:
    """A message if vLLM's table of models does not have this class with LoRA; None is a class that is not known."""
    if class_name in WITH_LORA:
        return []
    known = f"{class_name} without LoRA" if class_name in WITHOUT_LORA else "no class of this model type that is known"
    return [f"vLLM's table of models has {known}; plug it in with --as merged"]


def _merged_limits(config: Mapping[str, Any], folder: Path) -> VllmLimits:
    """The limits for a complete checkpoint, given its config.json and its folder."""
    classes = config.get("architectures") or ["no class"]
    if classes[0] in WITH_LORA | WITHOUT_LORA:
        return VllmLimits((), (), shlex.join(["vllm", "serve", str(folder)]))
    return VllmLimits((f"vLLM's table of models, as it is known here, does not have {classes[0]}",), (), None)
