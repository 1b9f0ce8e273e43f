"""Compares a LoRA step of `offsite tune` with PEFT's on one device, normally a CUDA device.

    python -m benchmarks.gpu [--device cuda] [--shape 1b] [--result FILE]

Both train the same LoRA matrices on the same rows of a Llama with random weights, which is made on the device: no file
and no network is needed. Ours runs the model that `offsite.kernels.prepare` has prepared, and the loop, loss and
micro-batches of `offsite tune`. The peer is PEFT's model with the library's loss and torch's AdamW, with as many rows
at once as ours. They take turns. The first losses and gradients must agree; the result is the median over all steps.
"""

import argparse
import gc
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offsite.data.examples import Example
from offsite.data_owner.text_task import TextTask
from offsite.kernels import prepare, prepare_adapters
from offsite.kernels.runtime import Runtime, release_freed_memory, resolve_runtime, usual_tokens_at_once
from offsite.models.backbone import split_backbone_and_head
from offsite.training.loop import train
from offsite.training.loop_settings import LoopSettings
from offsite.training.master_weights import MasterWeights
from offsite.training.task import Batching

RANK, LR, WARMUP = 16, 1e-4, 2
_TOLERANCE = 0.03  # relative, of the first loss and the norm of its gradient, in bf16
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
LENGTHS = {"tiny": (8, 24), "1b": (128, 1024), "7b": (128, 1024)}  # of the rows, in tokens


@dataclass(frozen=True)
class Measured:
    """The measured steps of one contestant."""

    seconds: list[float]
    losses: list[float]
    norm: float  # of the gradient of the first step
    tokens: int  # in a step, without padding
    peak_bytes: int  # that torch held on the device; 0 on a CPU


def rows_of(shape: str, count: int) -> tuple[Example, ...]:
    """Rows of random ids, the second half of each with labels."""
    draw, (least, most) = np.random.default_rng(0), LENGTHS[shape]
    lengths = draw.integers(least, most, count).tolist()
    return tuple(Example(i, draw.integers(3, 32_000, length), length // 2) for i, length in enumerate(lengths))


def model_of(shape: str, runtime: Runtime) -> Any:
    """A Llama with random weights on the device; the same at every call."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32_000, max_position_embeddings=2048, **SHAPES[shape])
    with torch.device(runtime.device):
        model = AutoModelForCausalLM.from_config(config, dtype=runtime.dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def add_lora(model: Any) -> dict[str, torch.nn.Parameter]:
    """Add PEFT's LoRA matrices to all linear layers of the blocks, in the dtype of the model."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".layers." in name
    ]
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, bias="none"), model)
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in found.values():
        parameter.data = parameter.data.to(model.device, model.dtype)
    return found


def ours(shape: str, runtime: Runtime, examples: Sequence[Example], at_once: int, steps: int) -> Measured:
    """Train by `offsite tune`'s own loop; every step has all rows."""
    model = model_of(shape, runtime)
    network = split_backbone_and_head(model)
    prepare(model, runtime.device, runtime.dtype)
    weights = MasterWeights(add_lora(model))
    prepare_adapters(model, runtime.device)
    task = TextTask(network, examples, (), Batching(rows=len(examples), tokens=at_once, seed=0))
    marks, losses, norms = list[float](), list[float](), list[float]()

    def log(record: Any) -> None:
        if record["event"] == "step":  # its loss was read, so the device is done
            marks.append(time.perf_counter())
            losses.append(float(record["loss"]))
            norms.append(float(record["grad_norm"]))

    settings = LoopSettings(
        steps=WARMUP + steps,
        learning_rate=lambda step: LR,
        weight_decay=0.0,
        max_grad_norm=1.0,
        save_every=10**9,
        validates_after=lambda step: False,
    )
    with _peak(runtime) as peak:
        train(task, weights, settings, None, modules=[model], log=log)
    return _measured(marks, losses, norms, examples, peak)


def peft(shape: str, runtime: Runtime, examples: Sequence[Example], at_once: int, steps: int) -> Measured:
    """Train PEFT's model in a plain loop, with as many rows at once as ours."""
    model = model_of(shape, runtime)
    trained = list(add_lora(model).values())
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=runtime.device.type in ("cpu", "cuda"))
    task = TextTask(split_backbone_and_head(model), examples, (), Batching(len(examples), at_once, 0))
    labels = sum(example.labels for example in examples)
    batches = [_batch([examples[i] for i in group]) for group in task.micro_batches(range(len(examples)))]
    marks, losses, norms = list[float](), list[float](), list[float]()
    model.train()
    with _peak(runtime) as peak:
        for _ in range(WARMUP + steps):
            found = []
            for batch in batches:
                there = {name: tensor.to(runtime.device) for name, tensor in batch.items()}
                loss = model(**there, num_items_in_batch=labels, use_cache=False).loss
                loss.backward()
                found.append(loss.detach())
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(torch.stack(found).sum()))
            norms.append(float(norm))
            marks.append(time.perf_counter())
    return _measured(marks, losses, norms, examples, peak)


def _batch(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Rows as the library's models take them, padded at the right; prompts have no labels."""
    width = max(len(example.ids) for example in examples)
    batch = {name: torch.full((len(examples), width), filler) for name, filler in (("input_ids", 0), ("labels", -100))}
    batch["attention_mask"] = torch.zeros(len(examples), width, dtype=torch.int64)
    for i, example in enumerate(examples):
        ids = torch.from_numpy(example.ids)
        batch["input_ids"][i, : len(ids)] = ids
        batch["labels"][i, example.given : len(ids)] = ids[example.given :]
        batch["attention_mask"][i, : len(ids)] = 1
    return batch


class _peak:  # noqa: N801  a context manager
    """Measures the peak memory of torch on a CUDA device; `bytes` is 0 elsewhere."""

    def __init__(self, runtime: Runtime) -> None:
        self.device, self.bytes = runtime.device, 0

    def __enter__(self) -> "_peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)


def _measured(
    marks: list[float], losses: list[float], norms: list[float], examples: Sequence[Example], peak: _peak
) -> Measured:
    seconds = [after - before for before, after in zip(marks[WARMUP - 1 :], marks[WARMUP:], strict=False)]
    return Measured(seconds, losses, norms[0], sum(len(example.ids) for example in examples), peak.bytes)


def compare(runtime: Runtime, shape: str, *, rows: int = 32, steps: int = 5, turns: int = 3) -> dict[str, Any]:
    """Measure both in turns.

    Args:
        runtime: the device and the compute dtype.
        shape: a key of `SHAPES`.
        rows: the rows of a step.
        steps: the measured steps of a turn.
        turns: how often each is measured.

    Returns:
        For each contestant the median seconds of a step, tokens per second, peak memory and the first loss; and the
        versions.

    Raises:
        RuntimeError: the first losses or gradients of both differ, so they do not compute the same.
    """
    examples, at_once = rows_of(shape, rows), usual_tokens_at_once(runtime, text=True)
    contestants: dict[str, Callable[..., Measured]] = {"offsite": ours, "peft": peft}
    found: dict[str, list[Measured]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, run in contestants.items():
            found[name].append(run(shape, runtime, examples, at_once, steps))
            gc.collect()
            release_freed_memory(runtime.device)
    first = {name: (measured[0].losses[0], measured[0].norm) for name, measured in found.items()}
    if not np.allclose(first["offsite"], first["peft"], rtol=_TOLERANCE, atol=0):
        raise RuntimeError(f"the contestants do not compute the same: first loss and norm of its gradient {first}")
    table = {}
    for name, measured in found.items():
        median = statistics.median(second for one in measured for second in one.seconds)
        table[name] = {
            "seconds": round(median, 5),
            "tokens_per_s": round(measured[0].tokens / median, 1),
            "peak_bytes": max(one.peak_bytes for one in measured),
            "first_loss": measured[0].losses[0],
            "last_loss": measured[0].losses[-1],
        }
    cuda = runtime.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(runtime.device) if cuda else str(runtime.device),
        "dtype": str(runtime.dtype),
        "shape": shape,
        "tokens_at_once": at_once,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "contestants": table,
        "times_as_fast": round(table["peft"]["seconds"] / table["offsite"]["seconds"], 3),
    }


def main() -> None:
    """Measure on the device that the command line names, and print and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--result", type=Path)
    wanted = parser.parse_args()
    result = json.dumps(compare(resolve_runtime(wanted.device), wanted.shape), indent=1)
    print(result)
    if wanted.result is not None:
        wanted.result.parent.mkdir(parents=True, exist_ok=True)
        wanted.result.write_text(f"{result}\n")


if __name__ == "__main__":
    main()
