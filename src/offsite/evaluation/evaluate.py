"""Scores a language model on held-out rows: loss, accuracy on multiple-choice rows, and generated answers.

Every metric comes with a 95 % confidence interval over the rows (`offsite.evaluation.intervals`).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from offsite.config import EvalSpec
from offsite.data.data_files import DataPaths
from offsite.data.examples import require_known
from offsite.data.read_rows import read_rows
from offsite.data.row import Row, RowForm
from offsite.data.tokens import encode, encode_choices, encode_prompt, open_tokenizer
from offsite.evaluation.intervals import Interval, interval
from offsite.evaluation.lineage import require_lineage
from offsite.evaluation.multiple_choice import ChoiceScore, score_choices
from offsite.evaluation.row_losses import RowLoss, perplexity, row_losses
from offsite.kernels.runtime import Runtime, resolve_runtime
from offsite.models.adapted import load_adapted, load_bottlenecked, load_replaced
from offsite.models.backbone import split_backbone_and_head
from offsite.models.hugging_face_calls import incompatible
from offsite.models.loading import load_model
from offsite.models.model_folder import Source, folder_of, has_file
from offsite.models.tokenizers import context_length
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base, Bundle, PlugIn, Return, files_of
from offsite.protocol.contents import BOTTLENECK_WEIGHTS, RETURNED_WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offsite.data.tokens import Tokenizer

ANSWER_TOKENS = 64  # length limit of a generated answer


@dataclass(frozen=True)
class Sample:
    """A prompt from the data set, the model's answer to it, and the data set's own answer as reference."""

    prompt: str
    reference: str
    answer: str


@dataclass(frozen=True)
class Score:
    """The result of `evaluate`: loss in nats per labelled token, other metrics, and the size of the data set."""

    loss: float
    perplexity: float
    completion_loss: float | None  # loss on the rows that are not plain text; None if there are none
    accuracy: float | None  # on multiple-choice rows, by log-likelihood; None if there are none
    accuracy_norm: float | None  # on multiple-choice rows, by log-likelihood per character; None if there are none
    tokens: int  # labelled tokens
    rows: int
    skipped: int  # rows left out: too long, or without a label
    seconds: float  # duration of the passes for the loss
    tokens_per_s: float  # all tokens, with and without a label, per second of these passes
    intervals: Mapping[
        str, Interval
    ]  # intervals of the metrics above, by name; a metric of fewer than two rows has none
    samples: tuple[Sample, ...] = ()
    row_losses: tuple[RowLoss, ...] = field(default=(), repr=False)
    choice_scores: tuple[ChoiceScore, ...] = field(default=(), repr=False)


def evaluate(
    model: Path | Base | Bundle | PlugIn,
    data: DataPaths,
    spec: EvalSpec,
    *,
    adapter: Path | Return | PlugIn | None = None,
    samples: int = 0,
    progress: Progress = silent,
) -> Score:
    """Score a language model on held-out rows. Only labelled tokens count for the loss, as in tuning.

    Args:
        model: a base, a bundle or a merged plug-in. If it was verified, the verified files are scored; if it is a
            folder, the files in it.
        data: the data set, as `offsite.data.read_rows.read_rows` reads it.
        spec: the settings of the evaluation: lengths, device, compute dtype.
        adapter: the adapter that was tuned on that model: a return, or a plug-in saved as an adapter. None: the model
            is scored alone.
        samples: the number of answers to generate greedily, for the first prompts in the data.
        progress: receives the progress events.

    Raises:
        DataError: the data set is empty, or has bad or too long rows.
        UsageError: a folder is not a checkpoint or not an adapter.
        VerificationError: an artifact was read again and had changed since it was verified.
        StorageError: a file is missing or broken.
        IncompatibleError: the folder is not a plain checkpoint, the adapter does not fit it, or the tokenizer gives
            token ids that the model does not have.
    """
    require_lineage(model, adapter)
    runtime = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    rows = read_rows(data, RowForm(spec.columns or {}, spec.chosen), "held out")[: spec.max_rows]
    source = files_of(model)
    longest = min(spec.max_length, context_length(source) or spec.max_length)
    with open_tokenizer(source) as tokenizer:
        encoded = encode(rows, tokenizer, source=data, max_length=longest, long_rows=spec.long_rows)
        examples = encoded.examples[: spec.max_rows]  # a long text is one row, and many examples
        questions = encode_choices(rows, tokenizer, source=data, max_length=longest, long_rows=spec.long_rows)
        require_known([*examples, *(one for question in questions for one in question.examples)], source, data)
        prompted = [row for row in rows if row.prompt is not None and not row.left_out][:samples]
        network_model = load_tuned(source, files_of(adapter) if adapter else None, runtime)
        with incompatible(folder_of(source), "run"):
            network = split_backbone_and_head(network_model)
            started = time.perf_counter()
            losses = row_losses(network, examples, spec.micro_batch_tokens, progress)
            seconds = time.perf_counter() - started
            choices = score_choices(network, questions, spec.micro_batch_tokens, progress)
            answers = tuple(_generate_answers(network_model, tokenizer, prompted, longest, progress))
    return Score(
        **_compute_figures(
            losses, [loss for loss, example in zip(losses, examples, strict=True) if example.answers], choices
        ),
        tokens=sum(row.tokens for row in losses),
        rows=len(losses),
        skipped=encoded.skipped,
        seconds=round(seconds, 3),
        tokens_per_s=round(sum(len(example.ids) for example in examples) / seconds, 1),
        samples=answers,
        row_losses=tuple(losses),
        choice_scores=tuple(choices),
    )


def _compute_figures(
    losses: Sequence[RowLoss], completions: Sequence[RowLoss], choices: Sequence[ChoiceScore]
) -> dict[str, Any]:
    """Compute every metric and its interval, as the fields of a `Score`.

    Args:
        losses: the losses of all rows.
        completions: the losses of the rows that are not plain text.
        choices: the scores of the multiple-choice rows.
    """
    found: dict[str, float | None] = {}
    intervals: dict[str, Interval] = {}
    ratios: dict[str, tuple[list[float], list[float]]] = {
        "loss": ([row.nats for row in losses], [row.tokens for row in losses]),
        "completion_loss": ([row.nats for row in completions], [row.tokens for row in completions]),
        "accuracy": ([choice.right for choice in choices], [1.0] * len(choices)),
        "accuracy_norm": ([choice.right_by_length for choice in choices], [1.0] * len(choices)),
    }
    for name, (parts, sizes) in ratios.items():
        found[name] = sum(parts) / sum(sizes) if sizes else None
        if ends := interval(parts, sizes):
            intervals[name] = ends
    found["perplexity"] = perplexity(found["loss"] or 0.0)
    if "loss" in intervals:  # exp is increasing, so it maps percentiles to percentiles
        intervals["perplexity"] = Interval(perplexity(intervals["loss"].low), perplexity(intervals["loss"].high))
    return {**found, "intervals": intervals}


def load_tuned(model: Source, adapter: Source | None, runtime: Runtime) -> "PreTrainedModel":
    """Load a model and, if there is one, its adapter: LoRA matrices, bottlenecks, or trained tensors.

    Args:
        model: a checkpoint folder, or verified files of one.
        adapter: a return, or a plug-in saved as an adapter; None for the model alone.
        runtime: dtype and device.
    """
    if adapter is None:
        return load_model(model, dtype=runtime.dtype, device=runtime.device)
    if has_file(adapter, RETURNED_WEIGHTS):
        return load_replaced(model, adapter, RETURNED_WEIGHTS, dtype=runtime.dtype, device=runtime.device)
    if has_file(adapter, BOTTLENECK_WEIGHTS):
        return load_bottlenecked(model, adapter, BOTTLENECK_WEIGHTS, dtype=runtime.dtype, device=runtime.device)
    loaded: PreTrainedModel = load_adapted(model, adapter, dtype=runtime.dtype, device=runtime.device).get_base_model()
    return loaded


def _generate_answers(
    model: "PreTrainedModel",
    tokenizer: "Tokenizer",
    rows: Sequence[Row],
    longest: int,
    progress: Progress,
) -> list[Sample]:
    """Generate the model's answer to the prompt of each row; `longest` limits the tokens of prompt and answer together.

    A row with an empty prompt is left out if the tokenizer has no BOS token, since the model would have no input.
    """
    samples = []
    for done, row in enumerate(rows, start=1):
        prompt = row.prompt or ""
        ids = encode_prompt(row, tokenizer)
        if not ids:
            continue  # neither a prompt nor a BOS token, so there is no input
        limit = longest - min(ANSWER_TOKENS, longest // 2)
        if len(ids) > limit:  # the BOS token and the end of the prompt matter most
            ids = [ids[0], *ids[len(ids) - limit + 1 :]]
        answer = generate(model, ids, tokenizer.eos_token_id, min(ANSWER_TOKENS, longest - len(ids)))
        samples.append(Sample(prompt, row.completion, tokenizer.decode(answer, skip_special_tokens=True)))
        progress(Event("answering", done, len(rows)))
    return samples


@torch.no_grad()
def generate(model: "PreTrainedModel", prompt: Sequence[int], eos: int, limit: int) -> list[int]:
    """Generate tokens greedily after `prompt`, until `eos` or at most `limit` tokens, with a KV cache.

    This does not use transformers' `generate`, since a checkpoint's generation_config.json may set sampling, penalties
    or other rules for the end.

    Returns:
        The ids of the generated tokens, without EOS.
    """
    body, head = model.base_model, model.get_output_embeddings()
    ids = torch.tensor([list(prompt)], device=head.weight.device)  # (1, T)
    answer: list[int] = []
    cache = None
    while len(answer) < limit:
        output = body(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = int(F.linear(output.last_hidden_state[:, -1], head.weight, head.bias).argmax())
        if token == eos:
            break
        answer.append(token)
        ids = torch.tensor([[token]], device=ids.device)
    return answer
