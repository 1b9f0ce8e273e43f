"""A head that was tuned with the adapter: what of it comes back, and under which names. Torch-free.

It always comes back whole. Beside LoRA pairs it has the names that PEFT gives to its `modules_to_save`, so that return
and plug-in stay ordinary PEFT folders; beside the model's own tensors it has its own names.
"""

from offsite.config import Method
from offsite.models.architectures import ARCHITECTURES, Architecture
from offsite.protocol.manifest import BundleManifest, TensorEntry


def returned_name(name: str, family: Architecture, method: Method) -> str:
    """The name in a return of one of the head's tensors, by its name in files."""
    return f"base_model.model.{family.head_module}.{name.rpartition('.')[2]}" if method == "lora" else name


def head_names(bundle: BundleManifest, method: Method) -> dict[str, str]:
    """The names in the bundle of the head's tensors that may come back, by those in a return by this method."""
    family = ARCHITECTURES[bundle.architecture]
    return {returned_name(name, family, method): name for name in bundle.head}


def returned_head(bundle: BundleManifest, method: Method) -> dict[str, TensorEntry]:
    """Every tensor of the head that a return by this method must hold; none where the bundle does not permit it."""
    return {
        returned: TensorEntry(shape=bundle.head[name].shape, dtype="F32")
        for returned, name in head_names(bundle, method).items()
    }
