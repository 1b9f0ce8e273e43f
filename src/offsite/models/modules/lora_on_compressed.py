"""Lets PEFT put LoRA on linear layers that are stored in a compressed form, which it does not know by itself."""

from typing import TYPE_CHECKING

from offsite.models.modules.compressed_linear import FactoredLinear, QuantisedLinear

if TYPE_CHECKING:
    from peft import LoraConfig


def permit_compressed_layers(config: "LoraConfig") -> None:
    """Change a LoRA config so that compressed layers can get LoRA matrices too: y = layer(x) + scale * B A x.

    The matrices cannot be merged into such a layer; no code of this project merges them.
    """
    from peft.tuners.lora import Linear

    # the only way that PEFT offers for layers of one's own (its guide on custom models)
    config._register_custom_module({QuantisedLinear: Linear, FactoredLinear: Linear})
