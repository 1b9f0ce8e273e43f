"""Bottleneck adapters (arXiv 1902.00751): two small layers after attention and after the MLP of each trained block."""

from typing import TYPE_CHECKING

from torch import nn

from offsite.config import TuneSpec
from offsite.data_owner.methods.trainable_parameters import require_exactly
from offsite.models.modules.bottleneck_layers import insert_bottlenecks
from offsite.models.modules.declared_shapes import bottleneck_places
from offsite.protocol.manifest import BottleneckSettings, BundleManifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: "PreTrainedModel", manifest: BundleManifest, spec: TuneSpec) -> dict[str, nn.Parameter]:
    """Insert bottlenecks into the trained blocks, before the residual is added.

    Their initial weights are such that they do not change the output.

    Args:
        model: the bundle's model, changed in place.
        manifest: the bundle's manifest.
        spec: the settings of the tuning, with the width of the bottlenecks.

    Returns:
        The trainable parameters by their names in the return.

    Raises:
        IncompatibleError: the model's bottlenecks are not exactly those that the manifest permits.
    """
    places = bottleneck_places(manifest.family, manifest.split.trained)
    insert_bottlenecks(model, places, manifest.hidden, spec.adapter.width)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    require_exactly(trainable, BottleneckSettings(width=spec.adapter.width).tensors(manifest))
    return trainable
