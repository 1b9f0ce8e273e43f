"""Full tuning trains all tensors of the trained blocks, BitFit only their biases (arXiv 2106.10199)."""

from typing import TYPE_CHECKING

from torch import nn

from offsite.config import TuneSpec
from offsite.data_owner.methods.trainable_parameters import require_exactly
from offsite.models.architectures import ARCHITECTURES
from offsite.models.mixture import in_files
from offsite.protocol.manifest import BundleManifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: "PreTrainedModel", manifest: BundleManifest, spec: TuneSpec) -> dict[str, nn.Parameter]:
    """Make exactly the manifest's tensors for the method trainable; everything else stays frozen.

    BitFit trains every bias, also those of norms, and no other tensor of one dimension.

    Returns:
        The trainable parameters by their names in the model; `offsite.models.mixture.in_files` gives them the
        names and shapes of the return.

    Raises:
        IncompatibleError: the model does not have exactly these tensors in these shapes.
    """
    family, expected = ARCHITECTURES[manifest.architecture], manifest.own_tensors(spec.adapter.method)
    for name, parameter in model.named_parameters():
        if in_files(family, {name: parameter}).keys() <= expected.keys():
            parameter.requires_grad_(True)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    require_exactly(in_files(family, trainable), expected)
    return trainable
