"""Training of the output head: the whole head trains, together with the method, if the model's owner permits it."""

from typing import TYPE_CHECKING

from torch import nn

from offsite.config import TuneSpec
from offsite.data_owner.methods.trainable_parameters import require_exactly
from offsite.models.mixture import in_files
from offsite.protocol.manifest import BundleManifest
from offsite.protocol.output_head import returned_head, returned_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach_head(model: "PreTrainedModel", manifest: BundleManifest, spec: TuneSpec) -> dict[str, nn.Parameter]:
    """Make the output head trainable if the settings say so.

    Call this after attaching the method, which freezes the head.

    Args:
        model: the bundle's model, changed in place.
        manifest: the bundle's manifest.
        spec: the settings of the tuning.

    Returns:
        The head's parameters; empty if the head does not train. With LoRA the keys are their names in the return,
        otherwise their names in the model.

    Raises:
        IncompatibleError: the model's head is not exactly the one that the manifest permits.
    """
    if not spec.adapter.tune_head:
        return {}
    family, head = manifest.family, model.get_output_embeddings().requires_grad_(True)
    parameters = {f"{family.head_module}.{kind}": parameter for kind, parameter in head.named_parameters()}
    renamed = {returned_name(name, family, spec.adapter.method): parameter for name, parameter in parameters.items()}
    in_return = renamed if spec.adapter.method == "lora" else in_files(family, parameters)
    require_exactly(in_return, returned_head(manifest, spec.adapter.method))
    return renamed
