"""Compares an encoder that was imported from an ONNX file with the file's graph, on one picture.

The package onnx runs the graph with numpy, block by block up to the last one; heads are not run. Each part of the
imported encoder gets the input that the graph's part got, so that a difference is found in the part that makes it, and
rounding errors do not add up.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from offsite.data.read_rows import first
from offsite.errors import IncompatibleError

if TYPE_CHECKING:
    from torch import nn

_SCOPE = "/backbone/"  # start of the names of the encoder's nodes
_PATCHES = f"{_SCOPE}embeddings/patch_embeddings/projection/Conv"
# Largest difference, as a share of the root mean square of what the graph's part computes.
_EXACT, _HALF = 1e-3, 3e-2  # in fp32, and where the graph or the base has numbers of 16 bits
_POSITIONS = 0.1  # for pictures of another size than in training: versions of transformers interpolate differently

Array = npt.NDArray[Any]


class _NotComparedError(Exception):
    """The graph cannot be run, or its parts are not found; the message says why."""


@dataclass(frozen=True)
class _Tensors:
    """The names of the graph's tensors that are compared."""

    pixels: str  # what the patch embeddings read, (N, C, Y, X)
    streams: tuple[str, ...]  # hidden states before each block, and after the last one; each (N, T, H)
    norm: tuple[str, str] | None  # input, one of `streams`, and output of the last norm; None if it is not found


def compare_with_graph(model: Any, source: Path, folder: Path, side: int, dtype: str) -> str:
    """Compare the encoder in a base folder with the graph of the ONNX file that it was imported from.

    Args:
        model: the parsed ONNX file (onnx.ModelProto).
        source: the file, for messages.
        folder: the base folder, with config and weights.
        side: side in pixels of the picture, where the graph accepts any size.
        dtype: dtype of the base's weights, "BF16" or "F32".

    Returns:
        A sentence for the record of the import: how much was compared, or why nothing was.

    Raises:
        IncompatibleError: the encoder and the graph compute different features; the parts that differ are listed.
    """
    import torch

    from offsite.models.loading import load_model

    encoder = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    try:
        compared = list(_compare(model, encoder, side, dtype))
    except _NotComparedError as reason:
        return f"its features were not compared with those of the file's graph: {reason}"
    problems = [
        f"{part}: features differ by {distance:.2g} of their size, expected at most {limit:g}"
        for part, distance, limit in compared
        if not distance <= limit
    ]
    if problems:
        raise IncompatibleError(
            f"the encoder that was imported from {source} does not compute what the file's graph computes",
            reasons=first(problems),
            next_step="import the checkpoint that was exported, in safetensors or .bin",
        )
    largest = max(distance for part, distance, _ in compared if part != "embeddings")
    return f"on one picture, features of every block differ by at most {largest:.1g} of their size from the graph's"


def _compare(model: Any, encoder: Any, side: int, dtype: str) -> Iterator[tuple[str, float, float]]:
    """Yield for each part its name, the relative error of its output compared with the graph's, and the tolerance.

    Args:
        model: the parsed ONNX file.
        encoder: the imported encoder, loaded with transformers in float32.
        side: side in pixels of the picture, where the graph accepts any size.
        dtype: dtype of the base's weights, "BF16" or "F32".

    Raises:
        _NotComparedError: the graph cannot be run, or its parts are not found.
    """
    names = _find_tensors(model.graph, len(encoder.encoder.layer))
    picture = _picture(model.graph, side, int(encoder.config.num_channels))
    values = picture | _run(model, picture, [names.pixels, names.streams[0]])
    pixels, stream = values[names.pixels], values[names.streams[0]]
    limit = _HALF if stream.dtype == np.float16 or dtype != "F32" else _EXACT
    trained = pixels.shape[2:] == (encoder.config.image_size, encoder.config.image_size)
    distance = _share(_result(encoder.embeddings, pixels) - stream, stream)
    yield "embeddings", distance, limit if trained else _POSITIONS
    for index, name in enumerate(names.streams[1:]):
        before = names.streams[index]
        behind = _run(model, picture | {before: stream}, [name])[name]
        found = _result(encoder.encoder.layer[index], stream)
        yield f"block {index}", _share(found - behind, behind - stream), limit  # of what the block adds
        if names.norm is not None and names.norm[0] == name:
            expected = _run(model, picture | {name: behind}, [names.norm[1]])[names.norm[1]]
            yield "last norm", _share(_result(encoder.layernorm, behind) - expected, expected), limit
        stream = behind


def _find_tensors(graph: Any, blocks: int) -> _Tensors:
    """Find the tensors to compare in a graph with `blocks` blocks, by the names that torch's exporter gives to nodes.

    Raises:
        _NotComparedError: they are not there.
    """
    pixels = [node.input[0] for node in graph.node if node.name == _PATCHES]
    streams: list[str] = []
    for index in range(blocks):
        scope = f"{_SCOPE}encoder/layer.{index}/"
        inside = {name for node in graph.node if node.name.startswith(scope) for name in node.output}
        sums = [node for node in graph.node if re.fullmatch(re.escape(scope) + r"Add(_\d+)?", node.name)]
        entering = [name for name in sums[0].input if name not in inside] if sums else []
        if len(sums) < 2 or len(entering) != 1 or (streams and streams[-1] != entering[0]):
            raise _NotComparedError(f"it does not show where block {index} begins and ends")
        streams = [*(streams or entering), sums[-1].output[0]]
    if len(pixels) != 1 or not streams:
        raise _NotComparedError("it does not show where the encoder begins")
    norm = [node for node in graph.node if node.name.startswith(f"{_SCOPE}layernorm/")]
    read = {name for node in norm for name in node.input if name in streams}
    return _Tensors(pixels[0], tuple(streams), (read.pop(), norm[-1].output[0]) if len(read) == 1 else None)


def _picture(graph: Any, side: int, channels: int) -> dict[str, Array]:
    """Normal noise in the shape of the graph's only input, keyed by the input's name.

    Sizes that the graph leaves open are those of one square picture with this side in pixels and these channels.

    Raises:
        _NotComparedError: the input is not one tensor (N, C, Y, X) of floats.
    """
    from onnx import TensorProto

    stored = {tensor.name for tensor in graph.initializer}
    inputs = [one for one in graph.input if one.name not in stored]
    kinds = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
    tensor = inputs[0].type.tensor_type if len(inputs) == 1 else None
    if tensor is None or tensor.elem_type not in kinds or len(tensor.shape.dim) != 4:
        raise _NotComparedError("it does not read one tensor of pictures in floats")
    sizes = [size.dim_value or usual for size, usual in zip(tensor.shape.dim, (1, channels, side, side), strict=True)]
    return {inputs[0].name: np.random.default_rng(0).standard_normal(sizes).astype(kinds[tensor.elem_type])}


def _run(model: Any, given: Mapping[str, Array], wanted: Sequence[str]) -> dict[str, Array]:
    """Run the part of the graph that computes the tensors `wanted`, and return their values, keyed by name.

    Args:
        model: the parsed ONNX file.
        given: values of tensors from which the computation starts, keyed by name.
        wanted: the names of the tensors to compute.

    Raises:
        _NotComparedError: the package onnx cannot run them, or a result is not finite.
    """
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    nodes, names = _needed(model.graph, given, wanted)
    stored = [tensor for tensor in model.graph.initializer if tensor.name in names]
    if any(tensor.data_location == tensor.EXTERNAL for tensor in stored):
        raise _NotComparedError("some of its numbers lie in another file")
    inputs = {name: value for name, value in given.items() if name in names}
    entering = [helper.make_empty_tensor_value_info(name) for name in inputs]
    leaving = [helper.make_empty_tensor_value_info(name) for name in wanted]
    graph = helper.make_graph(nodes, "part", entering, leaving, stored)
    part = helper.make_model(graph, opset_imports=model.opset_import, functions=model.functions)
    try:
        with np.errstate(all="ignore"):
            found = ReferenceEvaluator(part).run(list(wanted), inputs)
    except Exception as error:  # noqa: BLE001 - operators of the package raise errors of any kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise _NotComparedError(f"the package onnx cannot run it ({reason})") from None
    if not all(bool(np.isfinite(value).all()) for value in found):
        raise _NotComparedError("it gives NaN or infinity")
    return dict(zip(wanted, found, strict=True))


def _needed(graph: Any, given: Mapping[str, Array], wanted: Sequence[str]) -> tuple[list[Any], set[str]]:
    """The nodes that compute the tensors `wanted` from those in `given`, in order; and the names of tensors.

    The names are those in `wanted`, and of all tensors that these nodes read.
    """
    names: set[str] = set(wanted)
    nodes = []
    for node in reversed(graph.node):  # a node stands behind those whose results it reads
        if names & set(node.output) - given.keys():
            nodes.append(node)
            names |= set(node.input)
    return nodes[::-1], names


def _result(module: "nn.Module", value: Array) -> Array:
    """The output, in float32, of a part of the encoder for the input `value`."""
    import torch

    with torch.no_grad():
        found = module(torch.from_numpy(value.astype(np.float32)))
    array: Array = (found[0] if isinstance(found, tuple) else found).numpy()
    return array


def _share(difference: Array, whole: Array) -> float:
    """The root mean square of a difference, divided by that of the whole."""
    sizes = [float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) for array in (difference, whole)]
    return sizes[0] / sizes[1] if sizes[1] else float(sizes[0] > 0)
