"""The encoder that is imported from an ONNX file computes what the file's graph computes, or the import is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from offsite.config import ImportSpec
from offsite.errors import IncompatibleError
from offsite.model_owner.importing.import_model import import_model
from offsite.model_owner.importing.import_record import read_record
from onnx_files import exported, tiny_dinov2

onnx = pytest.importorskip("onnx")


def note_of(file: Path, out: Path, **spec: Any) -> str:
    return read_record(import_model(file, out, ImportSpec(**spec)).folder).notes[1]


def refusal(file: Path, out: Path) -> IncompatibleError:
    with pytest.raises(IncompatibleError, match="does not compute what the file's graph computes") as caught:
        import_model(file, out)
    assert not out.exists()
    return caught.value


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"any_size": False},
        {"side": 24, "any_size": False},  # positions are interpolated, by graph and encoder alike
        {"half": True},
    ],
    ids=str,
)
def test_features_agree(tmp_path: Path, form: dict[str, Any]) -> None:
    file = exported(tiny_dinov2(tmp_path / "source"), tmp_path / "x.onnx", **form)
    note = note_of(file, tmp_path / "base")
    assert "features of every block differ by at most" in note
    share = float(note.partition("at most ")[2].split()[0])
    assert share < (1e-2 if form.get("half") else 1e-5)


def test_a_base_in_bf16(tmp_path: Path) -> None:
    file = exported(tiny_dinov2(tmp_path / "source"), tmp_path / "x.onnx")
    assert "features of every block" in note_of(file, tmp_path / "base", dtype="bf16")


def test_attention_heads_of_another_width(tmp_path: Path) -> None:
    """A file does not say how many heads there are; 64 is the width of every published one."""
    source = tiny_dinov2(tmp_path / "source", num_attention_heads=2)
    error = refusal(exported(source, tmp_path / "x.onnx"), tmp_path / "base")
    assert [reason.split(":")[0] for reason in error.reasons] == ["block 0", "block 1"]
    assert "safetensors" in str(error.next_step)


@pytest.mark.parametrize("other", [{"activation": nn.ReLU()}, {"activation": nn.SiLU()}, {"eps": 0.1}], ids=str)
def test_another_computation(tmp_path: Path, other: dict[str, Any]) -> None:
    error = refusal(exported(tiny_dinov2(tmp_path / "source"), tmp_path / "x.onnx", **other), tmp_path / "base")
    assert {"block 0", "block 1"} <= {reason.split(":")[0] for reason in error.reasons}


def changed(file: Path, change: Callable[[Any], None]) -> Path:
    """The ONNX file after a change of its graph."""
    model = onnx.load(str(file))
    change(model.graph)
    onnx.save(model, str(file))
    return file


def test_embeddings_that_differ(tmp_path: Path) -> None:
    """Such as by something that the graph does to a picture behind the patches."""

    def double(graph: Any) -> None:
        conv = next(node for node in graph.node if node.name.endswith("projection/Conv"))
        (result,) = conv.output
        conv.output[0] = "single"
        place = list(graph.node).index(conv) + 1
        graph.node.insert(place, onnx.helper.make_node("Add", ["single", "single"], [result], "/backbone/more/Add"))

    file = changed(exported(tiny_dinov2(tmp_path / "source"), tmp_path / "x.onnx"), double)
    assert [reason.split(":")[0] for reason in refusal(file, tmp_path / "base").reasons] == ["embeddings"]


def test_a_picture_that_the_graph_prepares(tmp_path: Path) -> None:
    """The encoder is compared from the patches on, so scaling in front of these does not count."""

    def scale(graph: Any) -> None:
        conv = next(node for node in graph.node if node.name.endswith("projection/Conv"))
        conv.input[0] = "scaled"
        graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.25), "factor"))
        graph.node.insert(0, onnx.helper.make_node("Mul", ["pixels", "factor"], ["scaled"], "/Mul"))

    file = changed(exported(tiny_dinov2(tmp_path / "source"), tmp_path / "x.onnx"), scale)
    assert "features of every block differ by at most" in note_of(file, tmp_path / "base")


def unknown_operator(graph: Any) -> None:
    node = next(node for node in graph.node if node.op_type == "Erf")
    node.op_type, node.domain = "FusedErf", "com.microsoft"


def two_inputs(graph: Any) -> None:
    graph.input.append(onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, [1, 4]))


def unnamed_sums(graph: Any) -> None:
    for node in graph.node:
        if node.name.endswith("/Add_1"):
            node.name = ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (unknown_operator, "the package onnx cannot run it"),
        (two_inputs, "does not read one tensor of pictures"),
        (unnamed_sums, "does not show where block 0 begins and ends"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path: Path, change: Callable[[Any], None], why: str) -> None:
    file = changed(exported(tiny_dinov2(tmp_path / "source"), tmp_path / "x.onnx"), change)
    note = note_of(file, tmp_path / "base")
    assert note.startswith("its features were not compared")
    assert why in note


def test_the_graph_is_another_implementation(tmp_path: Path) -> None:
    """Its numbers, by torch, are those of transformers; so the tests above compare two things."""
    from transformers import AutoConfig, AutoModel

    from offsite.model_owner.base_model import open_base
    from offsite.protocol.artifacts import Base
    from onnx_files import _Backbone

    source = tiny_dinov2(tmp_path / "source")
    reference, family = AutoModel.from_pretrained(source).eval(), open_base(Base(source)).family
    ours = _Backbone(AutoConfig.from_pretrained(source), 1, nn.GELU(), 1e-6)
    ours.load_state_dict({family.name_of(name) or name: tensor for name, tensor in reference.state_dict().items()})
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = reference(pixel_values=pixels).last_hidden_state, ours(pixels)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
