"""What timm published becomes a base: its weights as they are, sizes out of the tensors, preprocessing on Pillow."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from offsite.data.pictures.picture_files import load_processor
from offsite.errors import IncompatibleError, UsageError
from offsite.model_owner.base_model import open_base
from offsite.model_owner.importing.import_model import import_model
from offsite.models.families.architectures import ARCHITECTURES, architecture_of
from offsite.models.families.timm_family import FORMS, model_args
from offsite.models.loading import load_model
from offsite.protocol.artifacts import Base
from offsite.storage.checkpoint_folder import open_checkpoint
from tiny import VISION_KINDS, timm_imports, tiny_vision_base

TIMM = [kind for kind in VISION_KINDS if kind.startswith("timm")]
PUBLISHED = {
    "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711], "crop_pct": 0.9,
    "crop_mode": "center", "interpolation": "bicubic", "input_size": [3, 16, 16], "num_classes": 3,
}  # fmt: skip


def published(folder: Path, kind: str = "timm, eva", **settings: Any) -> Path:
    """A folder as timm publishes it: its own config, and the weights of a classifier."""
    tiny_vision_base(folder, kind, 2, classifier=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    content = {
        "architecture": config["architecture"], "num_classes": 3, "num_features": 32, "global_pool": "avg",
        "model_args": {"num_heads": 4}, "pretrained_cfg": PUBLISHED | settings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("form", TIMM)
def test_a_published_model_becomes_a_base(tmp_path: Path, form: str) -> None:
    source = published(tmp_path / "source", form)
    base = import_model(source, tmp_path / "base")
    opened = open_base(base)
    assert opened.blocks == 2
    assert opened.config["hidden_size"] == 32
    assert opened.config["intermediate_size"] == 48
    assert (opened.config["image_size"], opened.config["patch_size"]) == (16, 4)
    held = open_checkpoint(source).tensors
    assert set(held) - set(opened.tensors) == {"head.weight", "head.bias"}
    assert load_processor(base.folder).side == (16, 16)


def test_other_models_are_refused(tmp_path: Path) -> None:
    source = published(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architecture": "resnet50"}))
    with pytest.raises(IncompatibleError, match="timm's 'resnet50' is not supported"):
        import_model(source, tmp_path / "base")


@pytest.mark.parametrize(
    ("setting", "value"), [("crop_mode", "squash"), ("interpolation", "random"), ("crop_pct", 7), ("mean", "x")]
)
def test_preprocessing_that_is_not_ours_is_refused(tmp_path: Path, setting: str, value: object) -> None:
    source = published(tmp_path / "source", **{setting: value})
    with pytest.raises(IncompatibleError, match="preprocessing") as caught:
        import_model(source, tmp_path / "base")
    assert any(setting.removeprefix("crop_") in reason or "mean" in reason for reason in caught.value.reasons)


@pytest.mark.parametrize(
    "changed",
    [
        {"architecture": "hf-hub:x/y"},
        {"architecture": 3},
        {"model_args": {"depth": 2}},
        {"gates": 2},
        {"image_size": 0},
    ],
)
def test_a_config_that_asks_timm_for_something_else_is_not_loaded(tmp_path: Path, changed: dict[str, Any]) -> None:
    base = tiny_vision_base(tmp_path / "base", "timm, eva", 2)
    config = json.loads((base / "config.json").read_text()) | changed
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleError):
        architecture_of(config)
    with pytest.raises(IncompatibleError, match="not a plain checkpoint"):
        load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(IncompatibleError):
        open_base(Base(base))


@pytest.mark.parametrize(("hidden", "inner"), [(1408, 6144), (192, 512), (768, 2048), (1024, 2730), (33, 47)])
def test_timm_makes_the_wanted_width_of_the_ratio(hidden: int, inner: int) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 14, "patch_size": 14}
    made = model_args({**sizes, "hidden_size": hidden, "intermediate_size": inner})
    assert made is not None
    assert int(hidden * made["mlp_ratio"]) == inner


def test_without_timm_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it fails
    base = tiny_vision_base(tmp_path / "base", "timm, eva", 2)
    with pytest.raises((UsageError, IncompatibleError)) as caught:
        load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    assert "timm" in str(caught.value.next_step) + str(caught.value)


@pytest.mark.skipif(not timm_imports(), reason="timm cannot be imported here")
@pytest.mark.parametrize("form", TIMM)
def test_what_is_loaded_computes_what_timm_does(tmp_path: Path, form: str) -> None:
    import timm
    from safetensors.torch import load_file

    base = import_model(published(tmp_path / "source", form), tmp_path / "base").folder
    config = json.loads((base / "config.json").read_text())
    model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).eval()
    model.load_state_dict(load_file(base / "model.safetensors"), strict=True)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = load_model(base, dtype=torch.float32, device=torch.device("cpu"))(pixel_values=pixels).pooler_output
        assert torch.equal(found, model(pixels))


@pytest.mark.skipif(not timm_imports(), reason="timm cannot be imported here")
@pytest.mark.parametrize("name", FORMS)
def test_the_table_of_forms_is_timms(name: str) -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    depth, hidden = len(model.blocks), model.embed_dim
    state = {path: tuple(tensor.shape) for path, tensor in model.state_dict().items()}
    patch = state["patch_embed.proj.weight"][2]
    config = {
        "model_type": "timm_wrapper", "architecture": name, "hidden_size": hidden, "num_hidden_layers": depth,
        "num_attention_heads": FORMS[name].heads, "intermediate_size": state["blocks.0.mlp.fc2.weight"][1],
        "image_size": model.patch_embed.img_size[0], "patch_size": patch,
    }  # fmt: skip
    assert model.blocks[0].attn.num_heads == FORMS[name].heads
    family = ARCHITECTURES["timm_wrapper"]
    row_config = config | family.computed_settings(config)
    blocks = {
        family.in_block(index, path) for index in range(depth) for path in family.block_tensors(row_config, index)
    }
    assert set(state) == family.outer_tensors(row_config) | blocks
    assert not [problem for path, shape in state.items() if (problem := family.shape_problem(path, shape, row_config))]


@pytest.mark.skipif(not timm_imports(), reason="timm cannot be imported here")
@pytest.mark.parametrize("share", [0.875, 0.9, 1.0])
def test_pictures_are_prepared_as_timm_does(tmp_path: Path, share: float) -> None:
    import timm

    base = import_model(published(tmp_path / "source", crop_pct=share), tmp_path / "base").folder
    pixels = np.random.default_rng(0).integers(0, 256, (37, 37, 3), dtype=np.uint8)
    data = timm.data.resolve_data_config(PUBLISHED | {"crop_pct": share}, verbose=False)
    expected = timm.data.create_transform(**data, is_training=False)(Image.fromarray(pixels)).numpy()
    assert np.abs(load_processor(base)(pixels) - expected).max() < 1e-5
