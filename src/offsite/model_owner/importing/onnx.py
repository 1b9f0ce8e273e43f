"""Imports a DINOv2 encoder from an ONNX file: its weights with transformers' names, compared with the file's graph.

torch's ONNX export keeps the names of most parameters, but not of two kinds. The weight of a linear layer is stored
transposed, and is found by the MatMul node that uses it. The position embeddings are split into a constant for the
class token and one for the patches. Heads after the encoder are not imported.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offsite.errors import IncompatibleError, StorageError, UsageError
from offsite.extras import require
from offsite.model_owner.base_model import open_base
from offsite.model_owner.importing.compare_onnx import compare_with_graph
from offsite.model_owner.importing.import_record import ImportRecord, count_by_part
from offsite.model_owner.importing.write_weights import write_weights
from offsite.protocol.artifacts import Base
from offsite.protocol.contents import CONFIG, PROCESSOR
from offsite.storage.files import write_stream
from offsite.storage.safetensors_files import from_array

_ENCODER = "backbone."
_COMPUTING = ("MatMul", "Gemm", "Add", "Sub", "Mul", "Div", "Conv", "LayerNormalization")  # operators with weights
_HEAD_WIDTH = 64  # width of an attention head in every published DINOv2
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's values, used to train DINOv2
_BICUBIC = 3  # Pillow's number

Arrays = dict[str, npt.NDArray[np.float32]]


def import_onnx(source: Path, folder: Path, dtype: str, image_size: int | None) -> ImportRecord:
    """Write a base folder with the DINOv2 encoder of an ONNX file.

    Args:
        source: the ONNX file.
        folder: an existing folder, which becomes the base folder.
        dtype: dtype of the written weights, "BF16" or "F32".
        image_size: side of the input images in pixels; None means 224, rounded down to a multiple of the patch size, or
            the size in the file if that is smaller.

    Returns:
        The record of the import, with the tensors that were left out.

    Raises:
        UsageError: the package onnx is not installed, or the side is not a multiple of the patch size.
        StorageError: the file is damaged.
        IncompatibleError: the file does not contain a DINOv2 encoder, or its graph computes other features.
    """
    model = _read(source)
    arrays, left_out = _weights(model.graph, source)
    config = _config(arrays, source)
    patch, own = config["patch_size"], config["image_size"]
    side = image_size or min(own, 224 // patch * patch)
    if side % patch:
        raise UsageError(
            f"images of {side} pixels are not filled by patches of {patch}",
            next_step=f"give image_size a multiple of {patch}",
        )
    write_weights(folder, [from_array(name, array, dtype) for name, array in arrays.items()], source)
    config["dtype"] = {"BF16": "bfloat16", "F32": "float32"}[dtype]
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _MEAN,
        "image_std": _STD,
        "do_convert_rgb": True,
    }
    for name, content in ((CONFIG, config), (PROCESSOR, processor)):
        write_stream(folder / name, [json.dumps(content, indent=1).encode() + b"\n"])
    open_base(Base(folder))  # names tensors that are missing before the encoder is loaded
    compared = compare_with_graph(model, source, folder, own, dtype)
    return ImportRecord(("the DINOv2 encoder of an ONNX file", compared), left_out)


def _read(source: Path) -> Any:
    """The parsed file (onnx.ModelProto).

    Raises:
        UsageError: the package onnx is not installed.
        StorageError: the file cannot be read.
    """
    onnx = require("onnx", "onnx", "reading an ONNX file")
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(source), load_external_data=False)  # never another file than the one named
    except OSError as error:
        step = "check the path, and that you may read the file"
        raise StorageError(f"cannot read {source}: {error.strerror}", next_step=step) from error
    except DecodeError as error:
        raise _damaged(source, error) from error


def _damaged(source: Path, error: Exception) -> StorageError:
    return StorageError(f"{source} is no ONNX file", reasons=[str(error)[:200]], next_step="fetch the file again")


def _weights(graph: Any, source: Path) -> tuple[Arrays, dict[str, int]]:
    """Read the encoder's tensors, keyed by their names in transformers, and count the tensors of every other part.

    Raises:
        StorageError: values are damaged, or in another file.
        IncompatibleError: the encoder uses constants that are not among these tensors.
    """
    import onnx

    try:
        stored = {tensor.name: tensor for tensor in graph.initializer}
        found: Arrays = {}
        used: set[str] = set()  # initialisers that became tensors
        for name, tensor in stored.items():
            if name.startswith(_ENCODER):
                found[name.removeprefix(_ENCODER)] = _array(onnx, tensor)
                used.add(name)
        for node in graph.node:
            path = node.name.removeprefix("/" + _ENCODER.replace(".", "/")).removesuffix("/MatMul").replace("/", ".")
            if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in stored:
                found[f"{path}.weight"] = np.ascontiguousarray(_array(onnx, stored[node.input[1]]).T)
                used.add(node.input[1])
        places = [
            name
            for node in graph.node
            if node.name.startswith("/backbone/embeddings/") and node.op_type in ("Concat", "Reshape")
            for name in node.input
            if name in stored and stored[name].data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        ]
        positions = [_array(onnx, stored[name]) for name in places]
        _require_all_used(graph, stored, used, source)
    except (ValueError, TypeError) as error:
        raise _damaged(source, error) from error
    if len(positions) == 2:  # the class token's is the shorter one
        positions.sort(key=lambda array: array.shape[1])
        found["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    others = [name for name in stored if name not in used and name not in places]
    return found, count_by_part(others)


def _require_all_used(graph: Any, stored: Mapping[str, Any], used: Collection[str], source: Path) -> None:
    """Raise an error if a node of the encoder uses weights that are not imported; constants of one number do not count.

    Args:
        graph: the ONNX graph.
        stored: its initializers, keyed by name.
        used: the names of the imported initializers.
        source: the ONNX file, for the error.

    Raises:
        IncompatibleError: there are such weights; at most 20 are listed.
    """
    unused = {
        name: node.name
        for node in graph.node
        if node.name.startswith("/backbone/") and node.op_type in _COMPUTING
        for name in node.input
        if name in stored and name not in used and math.prod(stored[name].dims) > 1
    }
    if unused:
        raise IncompatibleError(
            f"{source} has tensors that would be lost",
            reasons=[f"unused tensor {name} of the node {node}" for name, node in sorted(unused.items())[:20]],
            next_step="import the checkpoint that was exported, in safetensors or .bin",
        )


def _array(onnx: Any, tensor: Any) -> npt.NDArray[np.float32]:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ValueError(f"{tensor.name} lies in another file")
    return np.asarray(onnx.numpy_helper.to_array(tensor), dtype=np.float32)


def _config(arrays: Arrays, source: Path) -> dict[str, Any]:
    """The encoder's config for transformers: sizes from the tensors' shapes, other values as in all published DINOv2.

    Raises:
        IncompatibleError: tensors of a DINOv2 encoder are missing.
    """
    patches = arrays.get("embeddings.patch_embeddings.projection.weight")
    positions = arrays.get("embeddings.position_embeddings")
    inner = arrays.get("encoder.layer.0.mlp.fc1.weight")
    blocks = {int(match[1]) for name in arrays if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    if patches is None or positions is None or inner is None or patches.ndim != 4 or positions.ndim != 3:
        raise IncompatibleError(
            f"{source} holds no DINOv2 encoder",
            reasons=["expected initialisers named backbone.embeddings..., backbone.encoder.layer.0... and so on"],
            next_step="import a model in safetensors, .bin or GGUF",
        )
    hidden, channels, patch, _ = patches.shape
    return {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": hidden,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, hidden // _HEAD_WIDTH),
        "mlp_ratio": inner.shape[0] // hidden,
        "image_size": math.isqrt(positions.shape[1] - 1) * patch,
        "patch_size": patch,
        "num_channels": channels,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_mask_token": False,
    }
