"""Measures one peer in a process of its own: transformers' Trainer tunes a whole image encoder.

    python -m benchmarks.image_peers '{"base": ..., "pictures": ..., "method": "full" or "lora", ...}'

`benchmarks.images` starts it. It prints one line of JSON: the seconds of each measured step, and the number of pictures
in these steps. Pictures are decoded once and stay in memory; they are cropped, mirrored and prepared by the code of
`offsite tune` under the same seeds, so every contestant gets the same arrays at the same cost.
"""

import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cells import RANK
from benchmarks.peers import arguments_of, clock_of

if TYPE_CHECKING:
    from torch import nn

    from offsite.data_owner.tuning_pictures import Album

SEED = 0  # of order and crops


def main() -> None:
    """Do the measurement that the JSON on the command line describes, and print its result."""
    wanted: dict[str, Any] = json.loads(sys.argv[1])
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    import torch
    from transformers import Trainer

    torch.set_num_threads(wanted["threads"])
    if wanted["keep_freed"]:
        from offsite.kernels.cpu.allocator import keep_freed_memory

        keep_freed_memory()
    album = album_of(Path(wanted["base"]), Path(wanted["pictures"]))
    model = classifier(wanted, len(album.classes))
    clock = clock_of(lambda batch: len(batch["pixel_values"]), Path(wanted["out"]))
    model.register_forward_pre_hook(clock.count, with_kwargs=True)
    rows = order_of(album, SEED)[: wanted["per_step"] * (wanted["warmup"] + wanted["steps"])]
    trainer = Trainer(
        model=model,
        args=arguments_of({**wanted, "pad_to": None}),
        train_dataset=[{"row": row} for row in rows],
        data_collator=lambda examples: collated(album, [example["row"] for example in examples]),
        callbacks=[clock],
    )
    trainer.train()
    times, pictures = zip(*clock.marks[wanted["warmup"] :], strict=True)
    seconds = [round(after - before, 4) for before, after in itertools.pairwise(times)]
    print(json.dumps({"seconds": seconds, "pictures": pictures[-1] - pictures[0]}))


def album_of(base: Path, pictures: Path) -> "Album":
    """Read the pictures as `offsite tune` does; returns them with their classes."""
    from offsite import TuneSpec
    from offsite.data_owner.tuning_pictures import open_album
    from offsite.progress import silent

    return open_album(base, pictures, None, TuneSpec(), silent)


def order_of(album: "Album", seed: int) -> list[int]:
    """The indices of the pictures in the order of the first epoch of `offsite tune` under this seed."""
    import numpy as np

    return [int(row) for row in np.random.default_rng([seed, 0]).permutation(len(album.train))]


def collated(album: "Album", rows: Sequence[int]) -> dict[str, Any]:
    """Make a batch of pixels (B, 3, Y, X) and classes (B,), cropped and mirrored as in the first epoch of a tuning."""
    import torch

    pixels = album.train.batch(rows, [SEED, 0])
    return {"pixel_values": torch.from_numpy(pixels), "labels": album.labels(album.train)[list(rows)]}


def classifier(wanted: dict[str, Any], classes: int) -> "nn.Module":
    """Make an encoder with a linear head, with all weights trainable or with PEFT's LoRA.

    Full fine-tuning has fp32 weights (under autocast if it computes in bf16); LoRA's frozen weights are bf16 if it
    does.

    Args:
        wanted: the measurement, from the JSON on the command line.
        classes: the number of classes.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    from offsite.models.families.architectures import architecture_of
    from offsite.models.image_encoder import encoder_of
    from offsite.models.loading import load_model

    class Classifier(nn.Module):
        """An encoder with a linear head, as in transformers' classifiers, which exist only for some encoders."""

        def __init__(self, body: Any) -> None:
            super().__init__()
            self._encoder = encoder_of(body)
            self.body, self.classifier = body, nn.Linear(self._encoder.inputs, classes)

        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            """Compute the mean cross-entropy of pictures with pixels (B, 3, Y, X) and classes (B,)."""
            return {"loss": F.cross_entropy(self.classifier(self._encoder.features(pixel_values.numpy())), labels)}

    narrow = wanted["method"] == "lora" and wanted["bf16"]
    body = load_model(
        Path(wanted["base"]), dtype=torch.bfloat16 if narrow else torch.float32, device=torch.device("cpu")
    )
    body.set_attn_implementation(wanted["attention"])
    whole = Classifier(body)
    if wanted["method"] == "full":
        return whole.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    config = body.config.to_dict()
    family = architecture_of(config)
    blocks = [
        family.in_block(index, path)
        for index in range(family.block_count(config))
        for path in family.lora_linears_of(config)
    ]
    targets = [f"body.{family.module_of(block)}" for block in blocks]
    adapted = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, modules_to_save=["classifier"])
    return get_peft_model(whole, adapted)


if __name__ == "__main__":
    main()
