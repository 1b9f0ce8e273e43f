"""The tuning methods, one file each. Each has a function that attaches the parameters that it trains to a model."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from offsite.config import Method, TuneSpec
from offsite.data_owner.methods import block_parameters, bottleneck, lora
from offsite.protocol.manifest import BundleManifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Attach = Callable[["PreTrainedModel", BundleManifest, TuneSpec], dict[str, nn.Parameter]]

METHODS: Mapping[Method, Attach] = {
    "lora": lora.attach,
    "full": block_parameters.attach,
    "bitfit": block_parameters.attach,
    "bottleneck": bottleneck.attach,
}
