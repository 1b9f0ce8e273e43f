"""One measurement of a peer: fine-tuning the whole model with transformers' Trainer, in a process of its own.

    python -m benchmarks.peers '{"base": ..., "data": ..., "method": "full" or "lora", ...}'

`benchmarks.tuning` calls it; it prints one line of JSON: seconds and real tokens of the steps after the warm-up, and
the process's peak resident memory.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

RANK = 16


def main() -> None:
    """Run one measurement."""
    wanted: dict[str, Any] = json.loads(sys.argv[1])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(wanted["threads"])
    if wanted["keep_freed"]:
        from offsite.core.runtime import _keep_freed_memory

        _keep_freed_memory()
    rows = _rows(Path(wanted["base"]), Path(wanted["data"]))
    lora = wanted["method"] == "lora"
    # full fine-tuning keeps fp32 weights under autocast; LoRA's frozen weights are bf16 and so are cast once
    dtype = torch.bfloat16 if lora else torch.float32
    model = AutoModelForCausalLM.from_pretrained(wanted["base"], dtype=dtype, local_files_only=True)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    seen = _Seen()

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Time and tokens at the end of every optimiser step."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.marks.append((time.perf_counter(), seen.tokens))

    batch, steps = wanted["batch"], wanted["warmup"] + wanted["steps"]
    arguments = TrainingArguments(
        output_dir=wanted["out"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=wanted["rows"] // batch,
        max_steps=steps,
        learning_rate=1e-5,
        bf16=True,
        use_cpu=True,
        optim="adamw_torch_fused",
        train_sampling_strategy="random" if wanted["pad_to"] else "group_by_length",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        dataloader_num_workers=0,
        disable_tqdm=True,
        remove_unused_columns=False,
    )

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, Any]:
        width = wanted["pad_to"] or max(len(example["input_ids"]) for example in examples)
        seen.tokens += sum(len(example["input_ids"]) for example in examples)

        def padded(key: str, filler: int) -> torch.Tensor:
            lists = [example[key] if key in example else [1] * len(example["input_ids"]) for example in examples]
            return torch.tensor([values[:width] + [filler] * (width - len(values)) for values in lists])

        return {
            "input_ids": padded("input_ids", 0),
            "labels": padded("labels", -100),
            "attention_mask": padded("attention_mask", 0),
        }

    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()])
    trainer.train()
    (begin, before), (end, after) = seen.marks[wanted["warmup"] - 1], seen.marks[-1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": end - begin, "tokens": after - before, "peak_bytes": peak}))


class _Seen:
    """Real tokens that went through the collator, and marks of steps; the loader fetches no batch ahead of its step."""

    def __init__(self) -> None:
        self.tokens = 0
        self.marks: list[tuple[float, int]] = []


def _rows(base: Path, data: Path) -> list[dict[str, list[int]]]:
    """Token ids and labels as our own tuning makes them; prompts carry no loss."""
    from offsite.core.data import encode
    from offsite.core.load import load_tokenizer
    from offsite.core.rows import read_rows

    found = encode(read_rows(data), load_tokenizer(base), source=data, max_length=1024, long_rows="truncate").examples
    return [
        {
            "input_ids": example.ids.tolist(),
            "labels": [-100] * example.given + example.ids[example.given :].tolist(),
        }
        for example in found
    ]


if __name__ == "__main__":
    main()
