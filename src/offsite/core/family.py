"""What a model family is: where blocks, embeddings, head and linear maps are, and what may travel. Torch-free.

A family is a row of `families.py`, never a branch elsewhere. Names are those of the tensors in files as transformers
writes them today; `Architecture.name_of` maps the spellings of older published files to them.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offsite.errors import IncompatibleError

Rule = Callable[[Mapping[str, Any], int], Any]  # (config, index of a block) -> what transformers derives for it

# Masks and frequencies that files of many families held until 2023: computed, and no weights.
_BUFFERS = re.compile(
    r".+\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    r"|(attn|attention|self_attention|self_attn)\.(bias|masked_bias|embed_positions))"
)


@dataclass(frozen=True)
class Architecture:
    """One family of decoder language models.

    Sizes are products of numbers and config keys ("3*n_embd"); a factor that the config leaves out is free. Conditions
    are words that must all hold: "key", "!key", "key=2" or "key!=other"; " or " separates alternatives.
    """

    model_type: str
    class_name: str
    blocks: str  # path of the list of blocks
    embeddings: Mapping[str, str]  # tensors before the blocks, with their sizes
    final: Mapping[str, str]  # tensors after the blocks beside the head, with their sizes
    head: str
    linears: Mapping[str, str]  # paths in a block of the linear maps, where LoRA sits, with their weights' sizes
    norms: Mapping[str, str]  # tensors of a block beside its linear maps, with their sizes
    attention_out: str
    mlp_out: str
    count_keys: tuple[str, ...]  # config keys that hold the number of blocks, the one transformers reads first
    config_keys: frozenset[str]  # config keys that may travel
    head_size: str = "vocab_size hidden_size"
    tied_by_default: bool = False  # whether the head is the input embedding where the config does not say
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # condition ("": always) -> biased linear maps
    only_if: Mapping[str, str] = field(default_factory=dict)  # tensor -> condition without which it is not there
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what conditions take where a config leaves a key out
    transposed: bool = False  # linear maps store their weights (in, out): GPT-2's Conv1D
    # Whether, or under which condition, a block's output is linear in what mlp_out gives: what refit solves for.
    linear_residual: bool | str = True
    per_block: Mapping[str, Rule] = field(default_factory=dict)  # config keys with an entry per block, and its rule
    refused: Mapping[str, str] = field(default_factory=dict)  # switches that must be off, and why
    logit_cap: str | None = None  # config key c: logits are c * tanh(logits / c)
    spellings: Mapping[str, str] = field(default_factory=dict)  # older names of tensors -> today's

    def name_of(self, stored: str) -> str | None:
        """Today's name of a tensor as stored in a file, with or without the body's prefix; None for a mere buffer."""
        name = self.spellings.get(stored, stored)
        prefixed = f"{self.blocks.partition('.')[0]}.{name}"
        if self.block_of(prefixed) or prefixed in self.embeddings or prefixed in self.final:
            name = prefixed
        return None if _BUFFERS.fullmatch(name) else name

    def block_of(self, name: str) -> tuple[int, str] | None:
        """The index of the block that a tensor or module belongs to, and its path in the block."""
        match = re.fullmatch(rf"{re.escape(self.blocks)}\.(0|[1-9]\d{{0,4}})\.(.+)", name)
        return (int(match[1]), match[2]) if match else None

    def in_block(self, index: int, path: str) -> str:
        """The full name of a tensor or module of a block."""
        return f"{self.blocks}.{index}.{path}"

    def block_count(self, config: Mapping[str, Any]) -> int:
        """The number of blocks that a config names.

        Raises:
            IncompatibleError: the config names none, or two of its spellings disagree.
        """
        found = {key: config[key] for key in self.count_keys if key in config}
        numbers = {count for count in found.values() if type(count) is int and count > 0}
        if len(numbers) != 1 or any(type(count) is not int or count not in numbers for count in found.values()):
            raise IncompatibleError(
                "the config does not say how many blocks the model has",
                reasons=[f"found {found or 'none'}, expected one number under {' or '.join(self.count_keys)}"],
                next_step="mend config.json in the base folder",
            )
        return numbers.pop()

    def subset(self, config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """A config for the blocks of `kept` alone, in that order; lists that a config leaves to be derived are made.

        Raises:
            IncompatibleError: a list has not one entry per block.
        """
        count = self.block_count(config)
        lists = {key: self._per_block(key, config, count) for key in self.per_block}
        cut = {key: [entries[index] for index in kept] for key, entries in lists.items()}
        return (
            dict(config)
            | cut
            | {key: len(kept) for key in self.count_keys if key in config or key == self.count_keys[0]}
        )

    def _per_block(self, key: str, config: Mapping[str, Any], count: int) -> list[Any]:
        found = config.get(key)
        entries = [self.per_block[key](config, index) for index in range(count)] if found is None else found
        if not isinstance(entries, list) or len(entries) != count:
            raise IncompatibleError(
                f"the config's {key} has not one entry for each of the {count} blocks",
                next_step="mend config.json in the base folder",
            )
        return entries

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the head shares the input embedding's weights."""
        return bool(config.get("tie_word_embeddings", self.tied_by_default))

    def holds(self, condition: str, config: Mapping[str, Any]) -> bool:
        """Whether a condition of the table holds under a config."""
        return any(all(self._word(word, config) for word in either.split()) for either in condition.split(" or "))

    def _word(self, word: str, config: Mapping[str, Any]) -> bool:
        key, sign, other = re.fullmatch(r"(!?\w+?)(?:(!=|=)(\w+))?", word).groups()  # type: ignore[union-attr]
        found = config.get(key.lstrip("!"), self.defaults.get(key.lstrip("!")))
        if sign == "=":
            return bool(found == int(other))
        if sign == "!=":
            return found is not None and bool(found != config.get(other, self.defaults.get(other)))
        return bool(found) != key.startswith("!")

    def _present(self, names: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
        return [name for name in names if name not in self.only_if or self.holds(self.only_if[name], config)]

    def block_tensors(self, config: Mapping[str, Any]) -> frozenset[str]:
        """The paths in a block of all its tensors: exactly these, in every block."""
        biased = {path for condition, paths in self.biases.items() if self.holds(condition, config) for path in paths}
        return frozenset(
            {
                *(f"{path}.weight" for path in self.linears),
                *(f"{path}.bias" for path in biased),
                *self._present(self.norms, config),
            }
        )

    def embedding_tensors(self, config: Mapping[str, Any]) -> list[str]:
        """The names of the tensors before the blocks."""
        return self._present(self.embeddings, config)

    def outer_tensors(self, config: Mapping[str, Any]) -> frozenset[str]:
        """The names of all tensors outside the blocks; a tied head is none."""
        around = (*self.embedding_tensors(config), *self._present(self.final, config))
        return frozenset({*around, *(() if self.tied(config) else (self.head,))})

    def sizes_of(self, name: str) -> str | None:
        """The sizes of a tensor by its full name, or None if no tensor of the family has that name."""
        place = self.block_of(name)
        if place is None:
            return {**self.embeddings, **self.final, self.head: self.head_size}.get(name)
        path, _, kind = place[1].rpartition(".")
        if path in self.linears:
            sizes = self.linears[path].split()
            return {"weight": " ".join(sizes), "bias": sizes[self.transposed]}.get(kind)
        return self.norms.get(place[1])

    def shape_problem(self, name: str, shape: Sequence[int], config: Mapping[str, Any]) -> str | None:
        """What is wrong with a tensor's shape by the sizes that the config names; a size that it leaves out is free."""
        sizes = self.sizes_of(name)
        if sizes is None:
            return None
        expected = [_size(product, config) for product in sizes.split()]
        if len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True)):
            return None
        shown = ", ".join("any" if size is None else str(size) for size in expected)
        return f"{name[:120]!r} has shape {list(shape)}, the config makes it [{shown}]"

    def set_switches(self, config: Mapping[str, Any]) -> dict[str, object]:
        """The refused switches that a config turns on; transformers takes anything that is true for on."""
        return {key: config[key] for key in self.refused if config.get(key)}

    def residual_is_linear(self, config: Mapping[str, Any]) -> bool:
        """Whether a block's output is linear in what mlp_out gives, so that refit can solve for it."""
        linear = self.linear_residual
        return linear if isinstance(linear, bool) else self.holds(linear, config)


def _size(product: str, config: Mapping[str, Any]) -> int | None:
    factors: list[Any] = [int(factor) if factor.isdigit() else config.get(factor) for factor in product.split("*")]
    return int(math.prod(factors)) if all(type(factor) is int for factor in factors) else None


def config_problems(config: Mapping[str, Any], row: Architecture) -> list[str]:
    """What in a config may not travel: unknown keys (code, paths, hub kernels) and values that are no plain setting."""
    problems = [f"config key {key!r} is not permitted" for key in sorted(set(config) - row.config_keys)]
    problems += [
        f"config key {key!r} holds {str(config[key])[:60]!r}, which is no plain setting"
        for key in sorted(set(config) & row.config_keys)
        if not _plain(config[key], depth=3)
    ]
    return problems


_WORD = re.compile(r"[A-Za-z0-9_.+-]{0,64}")


def _plain(value: object, depth: int) -> bool:
    if value is None or isinstance(value, bool | int | float):
        return True
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    if isinstance(value, list) and depth:
        return len(value) <= 4096 and all(_plain(item, depth - 1) for item in value)
    if isinstance(value, dict) and depth:
        return len(value) <= 64 and all(_plain(key, 0) and _plain(item, depth - 1) for key, item in value.items())
    return False
