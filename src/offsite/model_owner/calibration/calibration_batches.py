"""Calibration data: the text or pictures that the model owner runs through its model to select and heal blocks.

It never comes from the data owner. For a language model it is a file of the model owner (plain text, or rows of any
kind), or the text that this package contains. For an image encoder it is a folder of the model owner's pictures, or
crops of the photos in scikit-image.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offsite.data.pictures.picture_files import load_processor
from offsite.data.pictures.picture_sets import read_pictures
from offsite.data.pictures.picture_sizes import picture_count, seen_picture, spread
from offsite.data.pictures.prepared_pictures import Pictures
from offsite.data.row import RowForm
from offsite.errors import DataError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.calibration.calibration_pictures import crops
from offsite.model_owner.calibration.calibration_text import (
    calibration_length,
    read_calibration_text,
    require_whole_sequence,
)
from offsite.models.tokenizers import load_tokenizer

CALIBRATION_BATCH = 8  # sequences or pictures per batch


def calibration_batches(model: BaseModel, file: Path | None, tokens: int, form: RowForm | None = None) -> list[Tensor]:
    """The calibration data as model inputs, in batches.

    For a language model: token ids (B, T), each sequence starting with BOS if the tokenizer has one. For an image
    encoder: pixels (B, 3, Y, X), as many pictures as make about `tokens` tokens.

    Args:
        model: the opened base.
        file: the owner's text file, rows or folder of pictures; None for the default data.
        tokens: the maximum number of tokens in all batches.
        form: the rows' own names of the fields that offsite reads, such as "prompt"; None: they are offsite's names.

    Raises:
        DataError: the text cannot be read or is too short for one sequence, or pictures cannot be read.
        UsageError: `tokens` is less than one sequence; or no pictures were named and scikit-image's are not installed.
    """
    if model.family.vision is not None:
        return _picture_batches(model, file, tokens, form)
    tokenizer = load_tokenizer(model.folder)
    ids = tokenizer(read_calibration_text(file, form), add_special_tokens=False, verbose=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    length = calibration_length(model.config)
    body = length - len(start)
    require_whole_sequence(length, tokens)
    ranges = fitted_ranges(len(ids), length, len(start), [tokens])
    if not ranges:
        raise DataError(
            f"the calibration text {file or 'that ships'} has {len(ids)} tokens, expected at least {body}",
            next_step="give more text with --calibration",
        )
    rows = torch.tensor([start + ids[one.start : one.stop] for one in ranges])
    return [rows[at : at + CALIBRATION_BATCH] for at in range(0, len(rows), CALIBRATION_BATCH)]


def fitted_ranges(tokens_of_text: int, length: int, start: int, amounts: Sequence[int]) -> list[range]:
    """The tokens of a text that calibration uses; the sequences are spread over the whole text.

    Args:
        tokens_of_text: number of tokens of the text.
        length: number of tokens of a sequence.
        start: number of these that do not come from the text, such as BOS.
        amounts: for each use of the text, the largest number of tokens in all its sequences.
    """
    body, found = length - start, []
    for tokens in amounts:
        if count := min(tokens // length, tokens_of_text // body):
            stride = tokens_of_text // count
            found += [range(i * stride, i * stride + body) for i in range(count)]
    return found


def token_counts(model: BaseModel, batches: Sequence[Tensor]) -> list[int]:
    """The number of tokens in each batch of texts or pictures, B * T."""
    if model.family.vision is None:
        return [batch.numel() for batch in batches]
    each = seen_picture(model.folder, model.family, model.config).tokens
    return [len(batch) * each for batch in batches]


def _picture_batches(model: BaseModel, folder: Path | None, tokens: int, form: RowForm | None) -> list[Tensor]:
    """`calibration_batches` for an image encoder; `folder` has the owner's pictures, None for the default pictures."""
    processor = load_processor(model.folder)
    count = picture_count(seen_picture(model.folder, model.family, model.config), model.config, tokens)
    if folder is None:
        made = torch.from_numpy(np.stack([processor(one, whole=True) for one in crops(count, processor.side)]))
        return [made[at : at + CALIBRATION_BATCH] for at in range(0, count, CALIBRATION_BATCH)]
    listed = read_pictures(folder, labelled=False, columns=form.columns if form else None)
    pictures = Pictures(spread(listed, count), processor, skip_bad=True)
    return [torch.from_numpy(pixels) for _, pixels in pictures.in_order(CALIBRATION_BATCH)]
