"""Methods that train the blocks' own tensors: full tuning trains all, BitFit only the biases (arXiv 2106.10199)."""

from typing import TYPE_CHECKING

from torch import nn

from offsite.config import TuneSpec
from offsite.data_owner.methods.trainable_parameters import require_exactly
from offsite.models.mixture import in_files
from offsite.protocol.manifest import BundleManifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: "PreTrainedModel", manifest: BundleManifest, spec: TuneSpec) -> dict[str, nn.Parameter]:
    """Make exactly those tensors trainable that the manifest lists for the method; all others stay frozen.

    BitFit trains every bias, including those of norms, and no other one-dimensional tensor.

    Args:
        model: the bundle's model, changed in place.
        manifest: the bundle's manifest.
        spec: the settings of the tuning, with the method.

    Returns:
        The trainable parameters by their names in the model; `offsite.models.mixture.in_files` converts them to the
        names and shapes of the return.

    Raises:
        IncompatibleError: the model does not have exactly these tensors with these shapes.
    """
    family, expected = manifest.family, manifest.own_tensors(spec.adapter.method)
    for name, parameter in model.named_parameters():
        if in_files(family, {name: parameter}).keys() <= expected.keys():
            parameter.requires_grad_(True)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    require_exactly(in_files(family, trainable), expected)
    return trainable
