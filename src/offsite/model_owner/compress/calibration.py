"""Calibration text: what the owner runs through its model to choose and heal the emulator's blocks.

Never the data owner's: it is the owner's own file, or the text that ships with this package.
"""

import json
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from offsite.core.load import load_tokenizer
from offsite.errors import DataError
from offsite.model_owner.base_model import BaseModel

CHUNK = 512  # tokens in a sequence, BOS included
BATCH = 8  # sequences that run at once


def calibration_batches(model: BaseModel, file: Path | None, tokens: int) -> list[Tensor]:
    """Token ids of the calibration text, in batches (B, CHUNK); each sequence starts with a BOS if there is one.

    Raises:
        DataError: the text cannot be read or is too short for one sequence.
    """
    tokenizer = load_tokenizer(model.folder)
    ids = tokenizer(_read(file), add_special_tokens=False, verbose=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    context = model.config.get("max_position_embeddings") or model.config.get("n_positions") or CHUNK
    length = min(CHUNK, int(context))
    body = length - len(start)
    count = min(tokens // length, len(ids) // body)
    if count == 0:
        raise DataError(
            f"the calibration text {file or 'that ships'} has {len(ids)} tokens, expected at least {body}",
            next_step="give more text with --calibration",
        )
    stride = len(ids) // count  # spread over the whole text, so that every part of it has its say
    rows = torch.tensor([start + ids[i * stride : i * stride + body] for i in range(count)])
    return [rows[at : at + BATCH] for at in range(0, count, BATCH)]


def _read(file: Path | None) -> str:
    if file is None:
        return (resources.files("offsite.model_owner") / "calibration.txt").read_text(encoding="utf-8")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the calibration text {file}", reasons=[str(error)]) from None
    if file.suffix != ".jsonl":
        return text
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(row["text"] if "text" in row else row["prompt"] + row["completion"])
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{file}, line {number} is no row of calibration text",
                reasons=['expected {"text": ...} or {"prompt": ..., "completion": ...}'],
            ) from None
    return "\n\n".join(rows)
