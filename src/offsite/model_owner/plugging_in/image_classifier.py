"""The plug-in of an image encoder: a complete image classifier for transformers, with head and class names.

The returned head is a linear layer on the same features as the head of transformers' classifier for this family. So
`AutoModelForImageClassification` loads the folder, and no code of this project is needed.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from offsite.model_owner.base_model import BaseModel
from offsite.models.families.family import Vision
from offsite.protocol.artifacts import Return
from offsite.protocol.contents import CLASSIFIER
from offsite.storage.safetensors_files import NewTensor, copied

# Config keys of the owner's own head, and of transformers' version.
_OWN = (
    "id2label", "label2id", "num_labels", "label_names", "num_classes", "problem_type", "_name_or_path",
    "transformers_version",
)  # fmt: skip


def classifier_tensors(
    model: BaseModel, vision: Vision, tuned: Mapping[str, NewTensor], returned: Return
) -> list[NewTensor]:
    """The classifier's tensors: the encoder's with the tuned ones replaced, and those of the returned head.

    They are named as in the files of transformers' classifier.

    Args:
        model: the opened base.
        vision: the image settings in the model's row of the architecture table.
        tuned: tensors that replace the base's, keyed by their name in the base.
        returned: the verified return.
    """
    tensors = []
    for name, tensor in model.tensors.items():
        new = tuned.get(name) or copied(tensor)
        tensors.append(NewTensor(f"{vision.prefix}.{name}", new.dtype, new.shape, new.chunks))
    head = returned.files.tensors(CLASSIFIER)
    return tensors + [copied(head[name], name=f"{vision.head}.{name.rpartition('.')[2]}") for name in head]


def classifier_config(model: BaseModel, vision: Vision, names: Sequence[str]) -> bytes:
    """The content of config.json for the image classifier.

    It is the encoder's config with the classes; for the image tower of a larger model, such as CLIP, it is a config of
    that model with the encoder's inside.

    Args:
        model: the opened base.
        vision: the image settings in the model's row of the architecture table.
        names: the class names, in the order of the head's outputs.
    """
    encoder = {key: value for key, value in model.config.items() if key not in (*_OWN, "architectures")}
    encoder |= model.family.fixed_settings
    whole: dict[str, Any] = encoder
    if vision.tower_of:
        whole = {"model_type": vision.tower_of, "vision_config": encoder}
        whole |= {key: encoder[key] for key in ("dtype", "torch_dtype") if key in encoder}
    labels: dict[str, Any] = {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
    if vision.label_list:
        labels = {vision.label_list: list(names), "num_classes": len(names)}
    return json.dumps({**whole, "architectures": [vision.class_name], **labels}, indent=1).encode() + b"\n"
