"""Full tuning and BitFit: the trained blocks' own tensors, all of them or their biases alone (arXiv 2106.10199)."""

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

    BitFit trains every bias, those of norms included, and no other tensor of one dimension.

    Returns:
        The trainable parameters by their names in the model; `core.mixture.in_files` makes of them what is returned.

    Raises:
        IncompatibleError: the model does not have exactly these tensors in these shapes.
    """
    row, wanted = ARCHITECTURES[manifest.architecture], manifest.own_tensors(spec.adapter.method)
    for name, parameter in model.named_parameters():
        if in_files(row, {name: parameter}).keys() <= wanted.keys():
            parameter.requires_grad_(True)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    require_exactly(in_files(row, trainable), wanted)
    return trainable
