"""Held-out loss of a model, and what it answers."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from offsite.config import EvalSpec
from offsite.core.data import Example, Row, collate, encode, encode_prompt, micro_batches, read_rows
from offsite.core.load import context_length, load_adapted, load_model, load_replaced, load_tokenizer
from offsite.core.loss import Network, label_losses, take_apart
from offsite.core.progress import Event, Progress, silent
from offsite.core.runtime import Runtime, runtime
from offsite.exchange.contents import RETURNED_WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANSWER_TOKENS = 64  # longest generated answer


@dataclass(frozen=True)
class Sample:
    """What a model answered to a prompt of the data set, beside what stands there."""

    prompt: str
    reference: str
    answer: str


@dataclass(frozen=True)
class RowLoss:
    """Nats summed over the labelled tokens of one row, and how many those are."""

    line: int
    nats: float
    tokens: int


@dataclass(frozen=True)
class Score:
    """Held-out loss in nats per labelled token, and what it was measured on."""

    loss: float
    perplexity: float
    tokens: int  # labelled ones
    rows: int
    skipped: int
    seconds: float
    tokens_per_s: float  # of all tokens that ran
    samples: tuple[Sample, ...] = ()
    row_losses: tuple[RowLoss, ...] = field(default=(), repr=False)


def evaluate(
    model: Path,
    data: Path,
    spec: EvalSpec,
    *,
    adapter: Path | None = None,
    samples: int = 0,
    progress: Progress = silent,
) -> Score:
    """Score a model on rows: labelled tokens only, as tuning sees them.

    Args:
        model: a checkpoint folder: base, bundle or merged plug-in.
        data: JSONL rows.
        spec: lengths, device, dtype of the arithmetic.
        adapter: what was tuned on that model: a return, or a plug-in in the form of an adapter.
        samples: answers to generate greedily, for the first prompts of the data.
        progress: where the events go.

    Raises:
        DataError: the data set is empty, or has bad or overlong rows.
        StorageError: a file is missing or broken.
        IncompatibleError: the folder is no plain checkpoint, or the adapter does not fit it.
    """
    where = runtime(spec.device, spec.compute, spec.threads)
    rows = read_rows(data)[: spec.max_rows]
    tokenizer = load_tokenizer(model)
    longest = min(spec.max_length, context_length(model) or spec.max_length)
    encoded = encode(rows, tokenizer, source=data, max_length=longest, long_rows=spec.long_rows)
    network_model = _load(model, adapter, where)
    started = time.perf_counter()
    losses = score(take_apart(network_model), encoded.examples, spec.micro_batch_tokens, progress)
    seconds = time.perf_counter() - started
    tokens = sum(row.tokens for row in losses)
    loss = sum(row.nats for row in losses) / tokens
    asked = [row for row in rows if row.prompt is not None][:samples]
    return Score(
        loss=loss,
        perplexity=perplexity(loss),
        tokens=tokens,
        rows=len(losses),
        skipped=encoded.skipped,
        seconds=round(seconds, 3),
        tokens_per_s=round(sum(len(example.ids) for example in encoded.examples) / seconds, 1),
        samples=tuple(_answers(network_model, tokenizer, asked, longest, progress)),
        row_losses=tuple(losses),
    )


def _load(model: Path, adapter: Path | None, where: Runtime) -> "PreTrainedModel":
    if adapter is None:
        return load_model(model, dtype=where.dtype, device=where.device)
    if (adapter / RETURNED_WEIGHTS).exists():
        return load_replaced(model, adapter / RETURNED_WEIGHTS, dtype=where.dtype, device=where.device)
    loaded: PreTrainedModel = load_adapted(model, adapter, dtype=where.dtype, device=where.device).get_base_model()
    return loaded


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def score(
    network: Network, examples: Sequence[Example], budget: int, progress: Progress = silent, stage: str = "evaluating"
) -> list[RowLoss]:
    """The loss of every example, in their order; the network is in eval mode already.

    Args:
        network: body and head.
        examples: what to score.
        budget: padded tokens that run at once.
        progress: where the events go.
        stage: the events' name.
    """
    found: dict[int, RowLoss] = {}
    nats_so_far, tokens_so_far = 0.0, 0
    for group in micro_batches(examples, range(len(examples)), budget):
        batch = collate([examples[i] for i in group])
        nats = label_losses(network, batch)[1].double().cpu()  # (L,)
        sums = torch.zeros(len(group), dtype=torch.float64).index_add_(0, torch.from_numpy(batch.owners), nats)
        for i, total in zip(group, sums.tolist(), strict=True):
            found[i] = RowLoss(examples[i].line, total, examples[i].labels)
            nats_so_far, tokens_so_far = nats_so_far + total, tokens_so_far + examples[i].labels
        progress(Event(stage, len(found), len(examples), {"loss": nats_so_far / tokens_so_far}))
    return [found[i] for i in range(len(examples))]


def _answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    longest: int,
    progress: Progress,
) -> list[Sample]:
    samples = []
    for done, row in enumerate(rows, start=1):
        prompt = row.prompt or ""
        ids = encode_prompt(prompt, tokenizer)
        if not ids:
            continue  # neither a prompt nor a beginning token: nothing to answer to
        most = longest - min(ANSWER_TOKENS, longest // 2)
        if len(ids) > most:  # the beginning token and the end of the prompt count most
            ids = [ids[0], *ids[len(ids) - most + 1 :]]
        answer = generate(model, ids, tokenizer.eos_token_id, min(ANSWER_TOKENS, longest - len(ids)))
        samples.append(Sample(prompt, row.completion, tokenizer.decode(answer, skip_special_tokens=True)))
        progress(Event("answering", done, len(rows)))
    return samples


@torch.no_grad()
def generate(model: "PreTrainedModel", prompt: Sequence[int], eos: int, most: int) -> list[int]:
    """The likeliest token again and again, up to EOS or `most` tokens, with a KV cache.

    Written out, since a checkpoint's generation_config.json may sample, penalise or stop as it likes.
    """
    body, head = model.base_model, model.get_output_embeddings()
    ids = torch.tensor([list(prompt)], device=head.weight.device)  # (1, T)
    answer: list[int] = []
    cache = None
    while len(answer) < most:
        output = body(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = int(F.linear(output.last_hidden_state[:, -1], head.weight, head.bias).argmax())
        if token == eos:
            break
        answer.append(token)
        ids = torch.tensor([[token]], device=ids.device)
    return answer
