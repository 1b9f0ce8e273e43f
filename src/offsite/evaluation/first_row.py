"""Tests whether a tuning can open a model: runs a few built-in rows, or a random picture, through the model.

The test calls the functions that a tuning calls.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from offsite.data.batches import collate
from offsite.data.conversations.parse_messages import Turn
from offsite.data.examples import Example, require_known
from offsite.data.pictures.picture_files import Floats, load_processor
from offsite.data.pictures.picture_sizes import seen_picture
from offsite.data.row import Row
from offsite.data.tokens import encode
from offsite.errors import DataError, IncompatibleError
from offsite.models.backbone import run_once
from offsite.models.families.family import Architecture
from offsite.models.hugging_face_calls import incompatible, quiet, require_library
from offsite.models.image_encoder import encoder_of
from offsite.models.loading import load_model
from offsite.models.mapped_weights import ReleasedWeights
from offsite.models.model_folder import Source, as_folder, folder_of, has_file
from offsite.models.tokenizers import context_length, load_config, load_tokenizer
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.mapped_files import MappedTensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIG, _GENERATION_CONFIG = "config.json", "generation_config.json"
_LONGEST = 64  # tokens of a row
_RUN = 8  # tokens of the row that is run: the largest models need seconds for each
_UNCUT = 2**20  # tokens: templates may write long introductions
_ROWS = (  # numbered from 1; letters of several scripts, signs, spaces at borders
    Row(1, "Question: What does a bundle hold?\nAnswer:", " The blocks to train, and what replaces the others."),
    Row(2, None, "def add(left, right):\n    return left + right\n"),
    Row(
        3,
        "Gr\u00fc\u00dfe aus M\u00fcnchen \u2014 \u65e5\u672c\u8a9e \U0001f642 ",
        "\u4f60\u597d, \u043f\u0440\u0438\u0432\u0435\u0442!\n",
    ),
)
_CONVERSATION = Row(
    4, None, "", turns=(Turn("user", "What is the capital of France?"), Turn("assistant", "It is Paris."))
)


def open_inputs(source: Source, family: Architecture, config: Mapping[str, Any]) -> list[Example] | Floats:
    """Load a model's tokenizer or image processor and prepare test inputs with it; no weights are read.

    Args:
        source: the model's folder, or a snapshot of its files.
        family: the model's family.
        config: the model's config; for a bundle of our own model type, the base's config nested in it.

    Returns:
        A few built-in rows as examples, or one random picture, (1, 3, Y, X).

    Raises:
        UsageError: an optional package is not installed.
        StorageError: a file cannot be read.
        IncompatibleError: the tokenizer or the image processor does not load, or does not fit the model.
    """
    _load_configs(source)
    if family.vision is not None:
        require_library(family, folder_of(source))
        pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        seen_picture(source, family, config)
        return load_processor(source)(pixels)[None]
    tokenizer = load_tokenizer(source)
    longest = min(_LONGEST, context_length(source) or _LONGEST)
    examples = [example for row in _ROWS for example in _encoded(row, tokenizer, longest)]
    examples += _encoded(_ROWS[1], tokenizer, min(_RUN, longest))
    if tokenizer.chat_template:
        examples += _conversation(tokenizer, source)
    require_known(examples, source, Path("text of the check"))
    return [example for example in examples if len(example.ids) <= longest]


def _load_configs(source: Source) -> None:
    """Load the config and the generation config, to check that transformers accepts them.

    Raises:
        IncompatibleError: transformers refuses one of them.
    """
    from transformers import GenerationConfig

    name, advice = _CONFIG, f"correct {_CONFIG} there"
    try:
        with quiet(), incompatible(folder_of(source)):
            load_config(source)
            if has_file(source, _GENERATION_CONFIG):
                name, advice = _GENERATION_CONFIG, f"correct {_GENERATION_CONFIG} there, or take it out"
                with as_folder(source) as folder:
                    GenerationConfig.from_pretrained(folder).validate()
    except IncompatibleError as error:
        raise IncompatibleError(
            f"transformers refuses {folder_of(source) / name}", reasons=error.reasons, next_step=advice
        ) from error


def _encoded(row: Row, tokenizer: "PreTrainedTokenizerBase", longest: int) -> Sequence[Example]:
    """Encode one row, cut to at most `longest` tokens."""
    return encode([row], tokenizer, source=Path("text of the check"), max_length=longest, long_rows="truncate").examples


def _conversation(tokenizer: "PreTrainedTokenizerBase", source: Source) -> Sequence[Example]:
    """Encode a question and its answer with the model's chat template.

    Raises:
        IncompatibleError: the template does not write both of them.
    """
    try:
        return _encoded(_CONVERSATION, tokenizer, _UNCUT)
    except DataError as error:
        raise IncompatibleError(
            f"the chat template in {folder_of(source)} cannot write a question and its answer",
            reasons=[reason.partition("'messages': ")[2] or reason for reason in error.reasons] or [error.what],
            next_step="correct chat_template.jinja there (or chat_template in tokenizer_config.json), or take it out: "
            "rows of prompt and completion do without",
        ) from None


@torch.no_grad()
def first_loss(folder: Path, family: Architecture, inputs: "list[Example] | Floats", dtype: torch.dtype) -> float:
    """Load a model's weights, and compute the loss of the shortest of the inputs that `open_inputs` returned.

    Weights that are stored in `dtype` stay in their files: each is in memory only while an operation reads it.

    Args:
        folder: the model's folder.
        family: the model's family.
        inputs: from `open_inputs`.
        dtype: the dtype of the loaded weights.

    Returns:
        The loss in nats per labelled token, or for pictures the sum of the features; NaN or infinite if the model is
        broken.

    Raises:
        StorageError: the weights cannot be read.
        IncompatibleError: the model does not load, its head is not a linear layer, or it does not accept the input.
    """
    mapped = MappedTensors(open_checkpoint(folder).tensors.values())
    model = load_model(folder, dtype=dtype, device=torch.device("cpu"), tensors=mapped.tensors)
    with incompatible(folder), ReleasedWeights(mapped):
        if family.vision is not None:
            encoder = encoder_of(model)
            features = encoder.features(np.asarray(inputs, dtype=np.float32))
            if features.shape[1] != encoder.inputs:
                raise IncompatibleError(
                    f"the encoder in {folder} has {features.shape[1]} features, expected {encoder.inputs}",
                    next_step="choose a model of another type; docs/models.md lists those that are tested",
                )
            return float(features.double().sum())
        examples = [example for example in inputs if isinstance(example, Example)]
        batch = collate([min(examples, key=lambda example: len(example.ids))])
        ran = run_once(model, torch.from_numpy(batch.ids))
        if not torch.isfinite(ran.logits).all():
            return math.nan  # before the check of the head, which no such model passes
        network, hidden = ran.split(model)
        logits = network.logits(hidden).flatten(0, 1)[torch.from_numpy(batch.places)].float()  # (L, V)
        return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.targets)))
