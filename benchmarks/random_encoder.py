"""Makes an image encoder with random weights in a published shape, or pictures of noise, to measure speed and memory.

    python -m benchmarks.random_encoder vit-s-14 FOLDER                   a base folder
    python -m benchmarks.random_encoder pictures FOLDER --count 48        pictures of ten classes

The shapes are DINOv2's ViT-S/14, and the image tower of CLIP ViT-L/14, both for 224 pixels.
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# name -> model type and settings
SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "vit-s-14": (
        "dinov2",
        {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14, "image_size": 224},
    ),
    "clip-vit-l-14": (
        "clip_vision_model",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
         "patch_size": 14, "image_size": 224},
    ),
}  # fmt: skip
_PHOTOGRAPH = (375, 500)  # height and width in pixels


def main() -> None:
    """Write the encoder or the pictures to a folder, which appears only when it is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*SHAPES, "pictures"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--classes", type=int, default=10)
    wanted = parser.parse_args()
    partial = wanted.folder.with_name(f".{wanted.folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    if wanted.what == "pictures":
        write_pictures(partial, wanted.count, wanted.classes)
    else:
        write_encoder(partial, wanted.what)
    partial.rename(wanted.folder)


def write_encoder(folder: Path, shape: str) -> None:
    """Write a base folder: a random encoder in bf16, and the config of its image processor."""
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    kind, settings = SHAPES[shape]
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.bfloat16).save_pretrained(folder)
    side = settings["image_size"]
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)


def write_pictures(folder: Path, count: int, classes: int) -> None:
    """Write `count` JPEG files of smooth noise, evenly spread over a sub-folder for each class."""
    import numpy as np
    from PIL import Image

    draw, (height, width) = np.random.default_rng(0), _PHOTOGRAPH
    for index in range(count):
        coarse = draw.integers(0, 256, size=(height // 25, width // 25, 3), dtype=np.uint8)
        target = folder / f"class-{index % classes}" / f"{index}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(target, quality=90)


if __name__ == "__main__":
    main()
