"""Full tuning: the trained blocks' own tensors; embeddings, final norm, head and emulator stay frozen."""

from typing import TYPE_CHECKING

from torch import nn

from offsite.config import TuneSpec
from offsite.data_owner.methods.trainable import require_exactly
from offsite.exchange.manifest import BundleManifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: "PreTrainedModel", manifest: BundleManifest, spec: TuneSpec) -> dict[str, nn.Parameter]:
    """Make exactly the manifest's tensors trainable.

    Returns:
        The trainable parameters by the names under which they are returned.

    Raises:
        IncompatibleError: the model does not have exactly these tensors in these shapes.
    """
    own = dict(model.named_parameters())
    for name in manifest.tensors:
        if name in own:
            own[name].requires_grad_(True)
    trainable = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
    require_exactly(trainable, manifest.tensors)
    return trainable
