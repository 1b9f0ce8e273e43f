"""LoRA on linear layers that are stored in a compressed form, which PEFT does not know by itself."""

from typing import TYPE_CHECKING

from offsite.models.modules.compressed_linear import FactoredLinear, QuantisedLinear

if TYPE_CHECKING:
    from peft import LoraConfig


def permit_compressed_layers(config: "LoraConfig") -> None:
    """Let a LoRA config, changed in place, attach pairs to compressed layers: y = layer(x) + scale * B A x.

    Merging such a pair into its layer is impossible; nothing here merges.
    """
    from peft.tuners.lora import Linear

    # the only way that PEFT offers for layers of one's own (its guide on custom models)
    config._register_custom_module({QuantisedLinear: Linear, FactoredLinear: Linear})
