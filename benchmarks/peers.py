"""Measures one peer in a process of its own: transformers' Trainer tunes a whole language model.

    python -m benchmarks.peers '{"base": ..., "rows": ..., "method": "full" or "lora", ...}'

`benchmarks.tuning` and `benchmarks.time_to_loss` start it. It prints one line of JSON: the seconds of each measured
step, the number of tokens (without padding) in these steps, and the peak memory until the model was loaded. With "save"
it also writes the model as a complete checkpoint after these steps; the time for this is not counted.
"""

import copy
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cells import RANK
from benchmarks.steps import encoded, steps_of

if TYPE_CHECKING:
    import torch
    from torch import nn


def main() -> None:
    """Do the measurement that the JSON on the command line describes, and print its result."""
    wanted: dict[str, Any] = json.loads(sys.argv[1])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from transformers import Trainer

    torch.set_num_threads(wanted["threads"])
    if wanted["keep_freed"]:
        from offsite.kernels.cpu.allocator import keep_freed_memory

        keep_freed_memory()
    rows, model = _rows(wanted), _model(wanted)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    clock = clock_of(lambda batch: int(batch["attention_mask"].sum()), Path(wanted["out"]), wanted.get("save", ()))
    # Where the model itself is called, since the loader fetches a batch ahead.
    model.register_forward_pre_hook(clock.count, with_kwargs=True)
    trainer = Trainer(
        model=model,
        args=arguments_of(wanted),
        train_dataset=rows,
        data_collator=lambda examples: _collated(examples, wanted["pad_to"]),
        callbacks=[clock],
    )
    trainer.train()
    times, tokens = zip(*clock.marks[wanted["warmup"] :], strict=True)
    seconds = [round(after - before, 4) for before, after in itertools.pairwise(times)]
    print(json.dumps({"seconds": seconds, "tokens": tokens[-1] - tokens[0], "loaded_bytes": loaded}))


def _model(wanted: dict[str, Any]) -> "nn.Module":
    """Load the base model, for LoRA with PEFT's matrices on all linear layers."""
    import torch
    from transformers import AutoModelForCausalLM

    # Full fine-tuning keeps fp32 weights under autocast, as the paper's code does for everything. LoRA's frozen
    # weights are bf16, which saves their casts; PEFT keeps the pairs in fp32.
    narrow = wanted["method"] == "lora" and wanted["bf16"] and not wanted["pad_to"]
    dtype = torch.bfloat16 if narrow else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        wanted["base"], dtype=dtype, attn_implementation=wanted.get("attention", "sdpa"), local_files_only=True
    )
    if wanted["method"] == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    return model


def arguments_of(wanted: dict[str, Any]) -> Any:
    """The `TrainingArguments` of the Trainer for a measurement, which the JSON on the command line describes."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=wanted["out"],
        per_device_train_batch_size=wanted["batch"],
        gradient_accumulation_steps=wanted["per_step"] // wanted["batch"],
        max_steps=wanted["warmup"] + wanted["steps"],
        learning_rate=wanted.get("lr", 1e-5),
        lr_scheduler_type="cosine",
        warmup_steps=round(0.05 * (wanted["warmup"] + wanted["steps"])),
        bf16=wanted["bf16"],
        use_cpu=True,
        optim="adamw_torch" if wanted["pad_to"] else "adamw_torch_fused",
        train_sampling_strategy="sequential",  # rows come in the order of the steps, similar lengths together
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        dataloader_num_workers=0,
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _rows(wanted: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The rows as token ids, labels and attention masks, in the order of `offsite tune`; prompts have no labels."""
    examples = encoded(Path(wanted["base"]), Path(wanted["rows"]))
    count = wanted["warmup"] + wanted["steps"]
    return [
        {
            "input_ids": example.ids.tolist(),
            "labels": [-100] * example.given + example.ids[example.given :].tolist(),
            "attention_mask": [1] * len(example.ids),
        }
        for step in steps_of(examples, wanted["per_step"], count, wanted["seed"])
        for example in step
    ]


def _collated(examples: list[dict[str, list[int]]], pad_to: int | None) -> "dict[str, torch.Tensor]":
    """Make a batch of rows, padded to the longest of them, or to `pad_to` tokens."""
    import torch

    width = pad_to or max(len(example["input_ids"]) for example in examples)
    fillers = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        key: torch.tensor([example[key] + [filler] * (width - len(example[key])) for example in examples])
        for key, filler in fillers.items()
    }


def clock_of(counted: Callable[[dict[str, Any]], int], folder: Path, save: Sequence[int] = ()) -> Any:
    """Make a Trainer callback that records the time and the number of tokens (or pictures) after every optimiser step.

    Args:
        counted: takes the named arguments of a call of the model; returns its tokens (without padding) or pictures.
        folder: the folder in which models are saved.
        save: the numbers of the steps after which the model is saved; the time for this is not counted.

    Returns:
        The callback. `marks` has a pair of seconds and number so far for the start and for every step; `count` must be
        registered as a forward pre-hook of the model.
    """
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen = 0
            self.marks: list[tuple[float, int]] = []
            self._stood = 0.0

        def count(self, module: Any, positional: Any, named: dict[str, Any]) -> None:
            self.seen += counted(named)

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.marks.append((time.perf_counter(), 0))

        def on_step_end(self, _: Any, state: Any, __: Any, model: Any, **___: Any) -> None:
            now = time.perf_counter()
            self.marks.append((now - self._stood, self.seen))
            if state.global_step in save:
                _save(model, folder / f"step-{state.global_step}")
                self._stood += time.perf_counter() - now

    return Clock()


def _save(model: Any, folder: Path) -> None:
    """Save the model as a complete checkpoint; LoRA matrices are merged in a copy."""
    if hasattr(model, "merge_adapter"):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
