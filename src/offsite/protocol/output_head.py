"""The tensors of a tuned output head in a return, and their names in it. Torch-free.

A return contains the whole head. With LoRA, its tensors have the names that PEFT gives to `modules_to_save`, so that
return and plug-in remain ordinary PEFT folders; with the methods "full" and "bitfit" they keep their own names.
"""

from offsite.config import Method
from offsite.models.families.architectures import Architecture
from offsite.protocol.manifest import BundleManifest, TensorEntry


def returned_name(name: str, family: Architecture, method: Method) -> str:
    """The name of a head tensor in a return tuned by `method`; `name` is its name in checkpoint files."""
    return f"base_model.model.{family.head_module}.{name.rpartition('.')[2]}" if method == "lora" else name


def head_names(bundle: BundleManifest, method: Method) -> dict[str, str]:
    """For each head tensor that may be returned: its name in a return tuned by `method` -> its name in the bundle."""
    family = bundle.family
    return {returned_name(name, family, method): name for name in bundle.head}


def returned_head(bundle: BundleManifest, method: Method) -> dict[str, TensorEntry]:
    """The shape and dtype, by name, of the head's tensors in a return tuned by `method` with the head.

    Empty if the bundle does not permit tuning the head.
    """
    return {
        returned: TensorEntry(shape=bundle.head[name].shape, dtype="F32")
        for returned, name in head_names(bundle, method).items()
    }
