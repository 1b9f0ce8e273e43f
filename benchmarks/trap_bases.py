"""Bases for the benchmark of traps: tiny models that were trained for a moment, and slices of a real model."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from offsite.model_owner.base_model import open_base
from offsite.model_owner.calibration.calibration_text import read_calibration_text
from offsite.models.families.architectures import architecture_of
from offsite.protocol.artifacts import Base
from offsite.storage.checkpoint_folder import write_checkpoint
from offsite.storage.safetensors_files import copied

_VOCABULARY = 1024
_SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 128, "tie_word_embeddings": True,
    },
    "gpt2": {"n_embd": 128, "n_head": 4, "n_positions": 128},
}  # fmt: skip
_SIZES["qwen3"] = _SIZES["llama"] | {"head_dim": 32}


def trained_base(folder: Path, model_type: str, *, blocks: int = 5, steps: int = 40, seed: int = 0) -> Path:
    """A language model of 128 channels, trained for some seconds on the text that packing calibrates on.

    Args:
        folder: where it goes.
        model_type: llama, qwen3 or gpt2.
        blocks: the number of blocks.
        steps: the number of training steps.
        seed: of weights and rows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    text = read_calibration_text(None)
    _tokenizer(folder, text)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = {"n_layer" if model_type == "gpt2" else "num_hidden_layers": blocks}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **_SIZES[model_type], **count, **ends)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            starts = torch.randint(len(ids) - 65, (8,))
            batch = torch.stack([ids[start : start + 64] for start in starts.tolist()])
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def _tokenizer(folder: Path, text: str) -> None:
    """Save a byte-level BPE tokenizer of 1,024 tokens, trained on a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def sliced_base(source: Path, folder: Path, kept: tuple[int, ...]) -> Path:
    """A base with only these blocks of a real model, whose weights are as they were."""
    config = json.loads((source / "config.json").read_text())
    family, model = architecture_of(config), open_base(Base(source))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(family.subset(config, kept))))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    tensors = []
    for name, tensor in model.tensors.items():
        place = family.block_of(name)
        if place is None:
            tensors.append(copied(tensor))
        elif place[0] in kept:
            tensors.append(copied(tensor, name=family.in_block(kept.index(place[0]), place[1])))
    write_checkpoint(folder, tensors)
    return folder


def words_of(folder: Path, count: int, letters: int = 3) -> dict[str, int]:
    """Words that are one token with the space before them, by their token ids, evenly over the vocabulary."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {
        token[1:]: number
        for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if token.startswith("Ġ") and token[1:].isascii() and token[1:].isalpha() and len(token) > letters
    }
    words = list(found)
    chosen = words[:: max(1, len(words) // count)][:count]
    return {word: found[word] for word in chosen}
