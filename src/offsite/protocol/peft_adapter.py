"""The config and tensors of a LoRA return and of an adapter plug-in, which are ordinary PEFT folders. Torch-free.

Both parties derive the same `adapter_config.json` from the same settings, and verification compares the two. So no
other key that PEFT acts on (an initialisation that changes base weights, a module to save, a path) is ever accepted.
"""

from collections.abc import Mapping

from offsite.models.families.architectures import Architecture
from offsite.protocol.manifest import LoraSettings, TensorEntry


def adapter_config(lora: LoraSettings, architecture: Architecture, *, head: bool = False) -> dict[str, object]:
    """The content of PEFT's `adapter_config.json` for a plain LoRA on exactly the targets of `lora`.

    Args:
        lora: the settings in the return's manifest.
        architecture: the family of the model.
        head: whether the output head was tuned too; it is then listed in `modules_to_save`.
    """
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION" if architecture.vision else "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(lora.targets),
        "fan_in_fan_out": architecture.transposed,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": [architecture.head_module] if head else None,
    }


def lora_pair(target: str) -> tuple[str, str]:
    """The names in `adapter_model.safetensors` of a target's two LoRA matrices: A (rank, in), then B (out, rank)."""
    return f"base_model.model.{target}.lora_A.weight", f"base_model.model.{target}.lora_B.weight"


def adapter_tensors(lora: LoraSettings, shapes: Mapping[str, tuple[int, int]]) -> dict[str, TensorEntry]:
    """The shape and dtype, by name, of the LoRA tensors that an adapter must contain.

    Args:
        lora: the rank and the targets.
        shapes: (in, out) features of every permitted target, as in `BundleManifest.lora_targets`.
    """
    expected = {}
    for target in sorted(lora.targets):
        inputs, outputs = shapes[target]
        a, b = lora_pair(target)
        expected[a] = TensorEntry(shape=(lora.rank, inputs), dtype="F32")
        expected[b] = TensorEntry(shape=(outputs, lora.rank), dtype="F32")
    return expected
