"""Small tokenizers of every kind that a language model may have, and one without offsets."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

TEXT = (
    "The quick brown fox jumps over the lazy dog.",
    "Two parties who do not trust each other tune one model.",
    "é ü naïve fi  double  spaces\n\nand lines",
    "Question: who jumps?\nAnswer: lions humans bunnies",
) * 3
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def byte_level(*, trim: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def metaspace(scheme: str, *, unigram: bool = False) -> Tokenizer:
    """As SentencePiece has it: a mark for every space, and with "first" or "always" one before the text."""
    tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    if unigram:
        tokenizer.normalizer = normalizers.NFKC()
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:
        trainer = trainers.BpeTrainer(vocab_size=650, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def prepended() -> Tokenizer:
    """As Llama 2's first tokenizer.json has it: the marks come from a normalizer, also after special tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = trainers.BpeTrainer(vocab_size=650, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator([part for line in TEXT for part in line.split()], words)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: byte_level(trim=False),
    "byte level, trimmed offsets": lambda: byte_level(trim=True),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, never": lambda: metaspace("never"),
    "prepended": prepended,
    "unigram": lambda: metaspace("always", unigram=True),
    "word piece": word_piece,
}
SLOW = "bytes, no offsets"


def tokenizer_of(kind: str, *, template: str | None = None, special: Sequence[str] = (), adds_bos: bool = False) -> Any:
    """A tokenizer of a kind, with a chat template and special tokens.

    Args:
        kind: one of KINDS, or SLOW.
        template: for conversations.
        special: tokens that it knows beside BOS and EOS.
        adds_bos: whether it puts BOS in front by itself.
    """
    if kind == SLOW:
        made: Any = ByT5Tokenizer(extra_ids=0)
        made.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": list(special)})
    else:
        inner = KINDS[kind]()
        if adds_bos:
            inner.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
            )
        made = PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        )
        if special:
            made.add_special_tokens({"additional_special_tokens": list(special)})
    made.chat_template = template
    return made


def saved_tokenizer(folder: Any, kind: str, **settings: Any) -> Any:
    """The same, saved to a folder of a model."""
    tokenizer = tokenizer_of(kind, **settings)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tokenizer
