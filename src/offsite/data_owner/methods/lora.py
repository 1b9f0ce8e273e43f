"""LoRA (arXiv 2106.09685): pairs of low-rank matrices on the linear layers that the manifest names."""

from typing import TYPE_CHECKING

from torch import nn

from offsite.config import TuneSpec
from offsite.data_owner.methods.trainable_parameters import require_exactly
from offsite.data_owner.return_manifest import lora_settings
from offsite.models.hugging_face_calls import quiet
from offsite.models.modules.lora_on_compressed import permit_compressed_layers
from offsite.protocol.manifest import BundleManifest
from offsite.protocol.peft_adapter import adapter_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: "PreTrainedModel", manifest: BundleManifest, spec: TuneSpec) -> dict[str, nn.Parameter]:
    """Add LoRA matrices to exactly the manifest's target layers, initialised by PEFT (A Kaiming uniform, B zero).

    Args:
        model: the bundle's model, changed in place.
        manifest: the bundle's manifest.
        spec: the settings of the tuning, with rank, alpha and dropout.

    Returns:
        The trainable parameters by their names in the return.

    Raises:
        IncompatibleError: the model's LoRA matrices are not exactly those that the manifest permits.
    """
    from peft import LoraConfig, inject_adapter_in_model

    lora = lora_settings(manifest, spec)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=spec.adapter.lora_dropout,
        # A list of full paths: for a model with experts, PEFT would use only the last words of a pattern.
        target_modules=list(lora.targets),
        fan_in_fan_out=manifest.family.transposed,
        bias="none",
    )
    permit_compressed_layers(config)
    with quiet():
        inject_adapter_in_model(config, model)
    trainable = {
        f"base_model.model.{name.replace('.default.weight', '.weight')}": parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for parameter in trainable.values():  # PEFT leaves those on compressed layers in fp32 on the CPU
        parameter.data = parameter.data.to(model.device, model.dtype)
    require_exactly(trainable, adapter_tensors(lora, manifest.lora_targets))
    return trainable
