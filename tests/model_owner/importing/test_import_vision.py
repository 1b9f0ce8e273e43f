"""Encoders out of ONNX files and out of models of images and texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from artifacts import packed
from offsite.config import ImportSpec
from offsite.data.pictures.picture_files import load_processor
from offsite.errors import IncompatibleError, StorageError, UsageError
from offsite.model_owner.base_model import open_base
from offsite.model_owner.importing.import_model import import_model
from offsite.model_owner.importing.import_record import read_record
from offsite.protocol.contents import PROCESSOR
from offsite.storage.checkpoint_folder import WEIGHTS
from onnx_files import exported, tiny_dinov2
from tiny import tiny_parties, tiny_vision_base

PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def states(folder: Path, **keywords: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = (
            AutoModel.from_pretrained(folder, **keywords).eval()(pixel_values=PIXELS).last_hidden_state
        )
    return found


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_tower_of_a_model_of_images_and_texts(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    config = AutoConfig.for_model(kind, vision_config=vision, text_config={**sizes, "vocab_size": 64})
    whole = AutoModel.from_config(config)
    whole.save_pretrained(tmp_path / "whole")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "whole")
    base = import_model(tmp_path / "whole", tmp_path / "base")
    opened = open_base(base)
    assert opened.family.vision is not None
    assert opened.family.vision.tower_of == kind
    assert not any("text" in name for name in opened.tensors)
    with torch.no_grad():
        expected = whole.vision_model.eval()(pixel_values=PIXELS).last_hidden_state
    keywords = {"vision_use_head": False} if kind == "siglip" else {}
    assert torch.equal(states(base.folder, **keywords), expected)


@pytest.mark.parametrize("named", [{"feature_extractor_type": "CLIPFeatureExtractor"}, {}])
def test_clip_with_the_processor_settings_of_2021(tmp_path: Path, named: dict[str, str]) -> None:
    """The bundle's pictures are the whole model's, whose type alone may say which class makes them."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    config = AutoConfig.for_model("clip", vision_config=vision, text_config={**sizes, "vocab_size": 64})
    AutoModel.from_config(config).save_pretrained(tmp_path / "whole")
    settings = {
        "crop_size": 16, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 20,
        "image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.26, 0.27],
    }  # fmt: skip
    (tmp_path / "whole" / PROCESSOR).write_text(json.dumps({**settings, **named}))
    base = import_model(tmp_path / "whole", tmp_path / "base")
    bundle = packed(base.folder, tmp_path / "bundle", tiny_parties(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3)).astype(np.uint8)
    expected = load_processor(tmp_path / "whole")(pixels)
    assert np.array_equal(load_processor(base.folder)(pixels), expected)
    assert np.array_equal(load_processor(bundle.folder)(pixels), expected)


def test_a_processor_of_no_known_class_is_refused_before_the_work(tmp_path: Path) -> None:
    base, parties = tiny_vision_base(tmp_path / "base", "clip tower", 3), tiny_parties(tmp_path)
    settings = json.loads((base / PROCESSOR).read_text())
    del settings["image_processor_type"]
    (base / PROCESSOR).write_text(json.dumps(settings))
    with pytest.raises(IncompatibleError, match="cannot load the image processor"):
        packed(base, tmp_path / "bundle", parties)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("kind", ["vit", "beit, relative positions"])
def test_a_folder_is_copied_with_its_processor(tmp_path: Path, kind: str) -> None:
    source = tiny_vision_base(tmp_path / "source", kind, 2, classifier=True)
    base = import_model(source, tmp_path / "base")
    assert torch.equal(states(base.folder), states(source))
    assert load_processor(base.folder).side == (16, 16)


def test_places_in_a_table_of_positions_are_no_weights(tmp_path: Path) -> None:
    """As files of BEiT hold them."""
    source = tiny_vision_base(tmp_path / "source", "beit, relative positions", 3)
    tensors = load_file(source / WEIGHTS)
    tables = [name for name in tensors if name.endswith("relative_position_bias_table")]
    index = torch.zeros(17, 17, dtype=torch.int64)
    tensors |= {name.replace("bias_table", "index"): index.clone() for name in tables}
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    base = import_model(source, tmp_path / "base")
    assert torch.equal(states(packed(base.folder, tmp_path / "bundle", tiny_parties(tmp_path)).folder), states(source))


def test_an_encoder_out_of_an_onnx_file(tmp_path: Path) -> None:
    source = tiny_dinov2(tmp_path / "source")
    base = import_model(exported(source, tmp_path / "x.onnx"), tmp_path / "base", ImportSpec(image_size=32))
    assert torch.equal(states(base.folder), states(source))
    assert load_processor(base.folder).side == (32, 32)
    plain = import_model(tmp_path / "x.onnx", tmp_path / "plain", ImportSpec(dtype="bf16"))
    assert load_processor(plain.folder).side == (16, 16)
    assert {tensor.dtype for tensor in open_base(plain).tensors.values()} == {"BF16"}


@pytest.mark.parametrize("operator", ["Mul", "Add", "Gemm"])
def test_weights_of_the_encoder_that_have_no_place(tmp_path: Path, operator: str) -> None:
    """Such as an adapter that was exported with the encoder."""
    onnx = pytest.importorskip("onnx")
    file = exported(tiny_dinov2(tmp_path / "source"), tmp_path / "x.onnx")
    model = onnx.load(str(file))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "onnx::more"))
    node = onnx.helper.make_node(operator, ["x", "onnx::more"], ["z"], f"/backbone/encoder/{operator}")
    model.graph.node.append(node)
    onnx.save(model, str(file))
    with pytest.raises(IncompatibleError, match="tensors that would be lost") as caught:
        import_model(file, tmp_path / "base")
    assert caught.value.reasons == (f"unused tensor onnx::more of the node /backbone/encoder/{operator}",)
    assert not (tmp_path / "base").exists()


def test_heads_are_counted(tmp_path: Path) -> None:
    base = import_model(exported(tiny_dinov2(tmp_path / "source"), tmp_path / "x.onnx"), tmp_path / "base")
    assert read_record(base.folder).left_out == {"decoder": 1}


def test_sides_that_patches_do_not_fill(tmp_path: Path) -> None:
    file = exported(tiny_dinov2(tmp_path / "source"), tmp_path / "x.onnx")
    with pytest.raises(UsageError, match="not filled by patches of 4"):
        import_model(file, tmp_path / "base", ImportSpec(image_size=30))
    assert not (tmp_path / "base").exists()


def test_what_is_no_encoder(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    (tmp_path / "noise.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(StorageError, match="is no ONNX file"):
        import_model(tmp_path / "noise.onnx", tmp_path / "base")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), str(tmp_path / "empty.onnx"))
    with pytest.raises(IncompatibleError, match="holds no DINOv2 encoder"):
        import_model(tmp_path / "empty.onnx", tmp_path / "base")


def test_weights_in_another_file_are_not_followed(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    tensor = onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "backbone.layernorm.weight")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/hostname"
    graph = onnx.helper.make_graph([], "outside", [], [], [tensor])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "x.onnx"))
    with pytest.raises(StorageError) as caught:
        import_model(tmp_path / "x.onnx", tmp_path / "base")
    assert "another file" in caught.value.reasons[0]
