"""The description of a model family: its blocks, embeddings, head, linear layers and permitted config keys. Torch-free.

A family is an entry of the table in `language_families.py`, or is derived from one model; no other code depends on it.
Tensor names are those in files that transformers writes today; `Architecture.name_of` maps names in older published
files to them. Some parameters of torch modules have other names (`Architecture.module_of`), and experts are stacked
there (`Architecture.stacked`).
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from offsite.config import RefitMap
from offsite.errors import IncompatibleError
from offsite.models.families.layouts import Layout

RefitWay = Literal["in closed form", "in front of the norm", "expert by expert", "as measured", "by gradient"]
Rule = Callable[[Mapping[str, Any], int], Any]  # (config, index of a block) -> the value that transformers derives

# Masks and frequencies that files of many families held until 2023; they are computed, and are not weights.
_BUFFERS = re.compile(
    r".+\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    r"|(attn|attention|self_attention|self_attn)\.(bias|masked_bias|embed_positions))"
)
_PLACES = ".relative_position_index"  # a computed buffer of encoders: the place of each pair of patches in a table
_MOST = 1024  # most experts, or heads with their own norms, that a config (which may be hostile) can have


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: files contain one matrix per linear layer and expert, torch modules contain stacks of them.

    A stack has shape (experts, outputs, inputs); if it contains several layers, their outputs are concatenated.
    """

    path: str  # path of the experts in a block, in files
    module: str  # path of the stacks in a block, in torch modules
    maps: Mapping[str, str]  # linear layers of one expert, with their weights' sizes
    out: str  # the last linear layer of an expert
    stacks: Mapping[str, tuple[str, ...]]  # parameters of the module -> the linear layers in each
    chosen_key: str = "num_experts_per_tok"  # config key with the number of experts that process a token
    where: Rule = lambda config, index: True  # whether a block has experts
    others: tuple[str, ...] = ()  # last linear layers of an MLP next to the experts, or in a block without experts


@dataclass(frozen=True)
class Vision:
    """The fields that only vision encoders have, and those of the matching image classifier in transformers."""

    class_name: str  # class of the classifier
    prefix: str  # path of the encoder in the classifier
    features: tuple[str, ...]  # the inputs of its linear head, concatenated: "class", "mean" (of patches) or "pooled"
    before: tuple[str, ...] = ("1",)  # tokens before the patches: numbers and config keys, added up
    stays: tuple[str, ...] = ()  # starts of names of tensors that are no part of the encoder: heads, poolers, buffers
    keywords: Mapping[str, Any] = field(default_factory=dict)  # arguments for transformers to build the encoder alone
    tower_of: str = ""  # model type of the larger model, and of its classifier, if the encoder is its image tower
    any_size: bool = False  # whether it fits its position embeddings to the image by itself
    head: str = "classifier"  # path of its linear head in the classifier
    label_list: str = ""  # config key of the classifier with the list of class names, if it has such a key
    extra: str = ""  # the optional package that builds the model, which is also the name of the extra


@dataclass(frozen=True)
class Architecture:
    """One family of decoder language models, or of vision encoders (which have no head).

    Sizes are products of numbers and config keys ("3*n_embd"); if the config lacks a key, any size is accepted.
    Conditions are words that must all hold: "key", "!key", "key=2" or "key!=other"; " or " separates alternatives. For
    a mixture of experts, sizes can use "experts" (the number of experts), and conditions can use "has_experts" (whether
    the block has experts).
    """

    model_type: str
    class_name: str
    blocks: str  # path of the list of blocks
    embeddings: Mapping[str, str]  # tensors before the blocks, with their sizes
    final: Mapping[str, str]  # tensors after the blocks except the head, with their sizes
    head: str
    linears: Mapping[str, str]  # paths in a block of its linear layers, with their weights' sizes
    norms: Mapping[str, str]  # all other tensors of a block, with their sizes
    attention_out: str
    mlp_out: str  # the last linear layer of the MLP, or the MLP's module if it has experts
    count_keys: tuple[str, ...]  # config keys with the number of blocks; the first is the one transformers reads
    config_keys: frozenset[str]  # config keys that a bundle may contain
    head_size: str = "vocab_size hidden_size"
    tied_by_default: bool = False  # whether the head is the input embedding if the config does not say so
    biases: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # condition ("": always) -> biased linear layers
    only_if: Mapping[str, str] = field(default_factory=dict)  # tensor -> condition under which it exists
    defaults: Mapping[str, Any] = field(default_factory=dict)  # values for conditions if a config lacks a key
    transposed: bool = False  # linear layers store their weights (in, out): GPT-2's Conv1D
    # Whether a block's output is linear in the output of mlp_out, apart from the norms in mlp_norms. Refit solves for
    # that output. False where it is not linear or not known: refit then measures the response of each block.
    linear_residual: bool = True
    # The same for attention_out, with the MLP's output fixed; None: as for mlp_out.
    linear_attention: bool | None = None
    # The norms that the output of mlp_out goes through in the block, alone or added to the residual, in order: paths of
    # modules -> the condition under which the norm is there.
    mlp_norms: Mapping[str, str] = field(default_factory=dict)
    attention_norms: Mapping[str, str] = field(default_factory=dict)  # the same for attention_out
    per_block: Mapping[str, Rule] = field(default_factory=dict)  # config keys with an entry per block, and its rule
    listed: Mapping[str, Rule] = field(default_factory=dict)  # config keys that list the blocks where a rule is true
    # Other config keys that the rules read -> their values in a config that lists every block.
    fixed_settings: Mapping[str, Any] = field(default_factory=dict)
    # Config keys from which lists are derived and which reveal the base's depth -> their value in a bundle's config.
    implied: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    among: Mapping[str, Collection[str]] = field(default_factory=dict)  # config keys that have one of these values
    # Config keys whose values are computed from other keys.
    follows: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)  # switches that must be off, and why
    limits: Mapping[str, int] = field(default_factory=dict)  # config keys -> the largest value, if it costs memory
    logit_cap: str | None = None  # config key c: logits are c * tanh(logits / c)
    spellings: Mapping[str, str] = field(default_factory=dict)  # older names of tensors -> today's
    modules: Mapping[str, str] = field(default_factory=dict)  # paths of tensors in files -> in modules, if different
    # Paths in a block of numbered modules (experts, heads), in whose tensors' names "*" replaces the number -> config
    # keys with the count.
    numbered: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: Experts | None = None
    adapted: tuple[str, ...] = ()  # linear layers that LoRA may adapt; (): all of them
    bypassed: Mapping[str, str] = field(
        default_factory=dict
    )  # linear layers -> condition under which LoRA has no effect
    vision: Vision | None = None
    module_blocks: str = ""  # path of the list of blocks in torch modules, if different
    heads_keys: tuple[str, ...] = ("num_attention_heads", "n_head")  # config keys with the number of heads
    head_positions: str = ""  # condition under which heads have biases for positions, by their number; "": never
    mlp_scale: str | None = None  # tensor of a block by which the output of mlp_out is multiplied before it is added
    attention_scale: str | None = None  # the same for attention_out
    # Only for a family that is derived from one model: its kinds of blocks, and for each block the index of its kind.
    layouts: tuple[Layout, ...] = ()
    layout_of: tuple[int, ...] = ()
    stored_names: Mapping[str, str | None] = field(default_factory=dict)  # names in its files -> names here (or buffer)
    runs_by_block: bool = True  # whether running block by block equals the whole model, as calibration and healing need
    cut: Callable[[Sequence[int]], Mapping[str, Any]] | None = None  # its config with only these blocks

    @property
    def lora_linears(self) -> tuple[str, ...]:
        """The paths in a block of all linear layers that can be LoRA targets under some config of the family."""
        return self.adapted or tuple(self.linears)

    def lora_linears_of(self, config: Mapping[str, Any], index: int = 0) -> tuple[str, ...]:
        """The paths in a block of its linear layers that can be LoRA targets under a config.

        `index` is the index of the block; it matters only for families that were derived from a model.
        """
        if self.layouts:
            return self.layout(index).linears
        return tuple(
            path
            for path in self.lora_linears
            if self.holds(self.only_if.get(f"{path}.weight", ""), config) and not self.is_bypassed(path, config)
        )

    def layout(self, index: int) -> Layout:
        """The kind of the block with this index, in a derived family; one without tensors if there is no such block."""
        return self.layouts[self.layout_of[index]] if index < len(self.layout_of) else Layout({}, ())

    def outputs_of(self, index: int) -> tuple[str, ...]:
        """The last layers of attention and MLP, after which bottlenecks are inserted: their paths in block `index`."""
        return self.layout(index).outputs if self.layouts else (self.attention_out, self.mlp_out)

    def is_bypassed(self, path: str, config: Mapping[str, Any]) -> bool:
        """Whether the parent of the linear layer at `path` uses its weight without calling it: LoRA has no effect."""
        return path in self.bypassed and self.holds(self.bypassed[path], config)

    def name_of(self, stored: str) -> str | None:
        """The name of a tensor in checkpoint files that transformers writes today; None for a buffer that is no weight.

        `stored` is a name from an older or current file, with or without the prefix of the body (such as "model."), or
        the name of a parameter in the torch model. A stack of experts has no single name in files and keeps its
        parameter's name.
        """
        if self.layouts:
            return self.stored_names.get(stored, stored)
        if self.vision is not None:
            return self._name_in_encoder(stored, self.vision)
        name = self.spellings.get(stored, stored)
        prefixed = f"{self.blocks.partition('.')[0]}.{name}"
        if self.block_of(prefixed) or prefixed in self.embeddings or prefixed in self.final:
            name = prefixed
        place = self.block_of(name) if self.modules else None
        if place is not None:
            paths = {module: path for path, module in self.modules.items()}
            name = self.in_block(place[0], paths.get(place[1], place[1]))
        return None if _BUFFERS.fullmatch(name) else name

    def _name_in_encoder(self, stored: str, vision: Vision) -> str | None:
        """A tensor's name in files of the encoder alone; None for tensors that do not belong to the encoder."""
        name = stored.removeprefix(f"{vision.prefix}.")
        if name.startswith(vision.stays) or name.endswith(_PLACES):
            return None
        files = {module: path for path, module in self.modules.items()}
        match = re.fullmatch(rf"{re.escape(self.module_blocks or self.blocks)}\.(0|[1-9]\d{{0,4}})\.(.+)", name)
        return self.in_block(int(match[1]), files.get(match[2], match[2])) if match else files.get(name, name)

    def module_of(self, name: str) -> str:
        """The name in the torch model of a tensor or linear layer, from its name in checkpoint files."""
        place = self.block_of(name)
        if place is None:
            return self.modules.get(name, name)
        path = self.modules.get(place[1])
        if path is None:  # the name of a linear layer, or a tensor with the same name
            path = self.modules.get(f"{place[1]}.weight", f"{place[1]}.weight").removesuffix(".weight")
        return f"{self.block_module(place[0])}.{path}"

    def linear_layer_of(self, target: str) -> tuple[int, str] | None:
        """(block index, path in the block in files) for the torch name of a linear layer; None for other names."""
        weight = self.name_of(f"{target}.weight")
        if weight is None or self.module_of(weight) != f"{target}.weight":
            return None
        return self.block_of(weight.removesuffix(".weight"))

    def stacked(self, name: str, count: int) -> list[tuple[str, ...]] | None:
        """The names in files of the matrices in a parameter that stacks `count` experts, as one tuple for each expert.

        Returns None for a parameter that is not such a stack; `name` is its name in the torch model.
        """
        place, experts = self.block_of(name), self.experts
        if place is None or experts is None:
            return None
        module, _, leaf = place[1].rpartition(".")
        if module != experts.module or leaf not in experts.stacks:
            return None
        return [
            tuple(self.in_block(place[0], f"{experts.path}.{n}.{path}.weight") for path in experts.stacks[leaf])
            for n in range(count)
        ]

    def is_linear(self, name: str) -> bool:
        """Whether a tensor or parameter is the weight of a linear layer in a block, or a stack of such weights."""
        place = self.block_of((self.name_of(name) or name) if self.vision else name)
        if place is None:
            return False
        if self.layouts:
            shape = self.layout(place[0]).shape_of(place[1])
            return shape is not None and len(shape) > 1 and not place[1].endswith("bias")
        path, _, kind = self.pattern_of(place[1]).rpartition(".")
        stack = self.experts is not None and path == self.experts.module and kind in self.experts.stacks
        return stack or (kind == "weight" and path in {**self.linears, **self._expert_maps})

    def block_of(self, name: str) -> tuple[int, str] | None:
        """(block index, path in the block) for the full name of a tensor or module; None if outside the blocks."""
        match = re.fullmatch(rf"{re.escape(self.blocks)}\.(0|[1-9]\d{{0,4}})\.(.+)", name)
        return (int(match[1]), match[2]) if match else None

    def block_module(self, index: int) -> str:
        """The path of the block with this index in the torch model."""
        return f"{self.module_blocks or self.blocks}.{index}"

    def in_block(self, index: int, path: str) -> str:
        """The full name in files of the tensor or module at `path` in the block with this index."""
        return f"{self.blocks}.{index}.{path}"

    def block_count(self, config: Mapping[str, Any]) -> int:
        """The number of blocks of a model, from its config.

        Raises:
            IncompatibleError: the config has no such number, or two of its keys for it disagree.
        """
        if self.layouts:
            return len(self.layout_of)
        count = _agreed(config, self.count_keys)
        if count is None:
            found = {key: config[key] for key in self.count_keys if key in config}
            raise IncompatibleError(
                "the config does not say how many blocks the model has",
                reasons=[f"found {found or 'none'}, expected one number under {' or '.join(self.count_keys)}"],
                next_step="correct config.json in the base folder",
            )
        return count

    def number_of(self, path: str, config: Mapping[str, Any]) -> int:
        """How many modules with a number in their name a block has at `path`: experts, or norms of attention heads.

        Raises:
            IncompatibleError: the config has no valid number, or two of its keys for it disagree.
        """
        keys = self.numbered[path]
        count = _agreed(config, keys, self.defaults.get(keys[0]))
        if count is None or count > _MOST:
            found = str({key: config[key] for key in keys if key in config})[:120]
            raise IncompatibleError(
                f"the config does not say how many {path} a block has",
                reasons=[f"{path}: found {found}, expected one number from 1 to {_MOST} under {' or '.join(keys)}"],
                next_step="correct config.json in the base folder",
            )
        return count

    def subset(self, config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """The config for a model with only the blocks `kept`, in that order; it contains every per-block list.

        Raises:
            IncompatibleError: a list does not have one entry per block, or a list cannot be derived from the config.
        """
        if self.cut is not None:
            return dict(self.cut(kept))
        count = self.block_count(config)
        lists = {key: self._per_block(key, config, count) for key in self.per_block}
        cut = {
            **config,
            **{key: [entries[index] for index in kept] for key, entries in lists.items()},
            **{key: [new for new, old in enumerate(kept) if rule(config, old)] for key, rule in self.listed.items()},
            **self.fixed_settings,
            **{key: len(kept) for key in self.count_keys if key in config or key == self.count_keys[0]},
        }
        implied = {key: rule(cut) for key, rule in self.implied.items() if key in config}
        return cut | self.computed_settings(cut) | implied

    def computed_settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config keys whose values are computed from other keys of the config, with the computed values."""
        return {key: rule(config) for key, rule in self.follows.items()}

    def strays(self, config: Mapping[str, Any]) -> list[str]:
        """A message for each config value that is not permitted, or differs from the value computed from other keys."""
        problems = [
            f"config has {key} = {str(config.get(key))[:60]!r}, expected one of {', '.join(sorted(values))}"
            for key, values in self.among.items()
            if not isinstance(config.get(key), str) or config[key] not in values
        ]
        return problems or [
            f"config has {key} = {str(config.get(key))[:120]!r}, the rest makes it {str(value)[:120]!r}"
            for key, value in self.computed_settings(config).items()
            if value is None or config.get(key) != value
        ]

    def _per_block(self, key: str, config: Mapping[str, Any], count: int) -> list[Any]:
        """The list under a config key, one entry for each of `count` blocks; if missing, as transformers derives it."""
        found = config.get(key)
        entries = [self.per_block[key](config, index) for index in range(count)] if found is None else found
        if not isinstance(entries, list) or len(entries) != count:
            raise IncompatibleError(
                f"the config's {key} has not one entry for each of the {count} blocks",
                next_step="correct config.json in the base folder",
            )
        return entries

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the head shares the input embedding's weights."""
        return bool(config.get("tie_word_embeddings", self.tied_by_default))

    def holds(self, condition: str, config: Mapping[str, Any]) -> bool:
        """Whether a condition (see the class) holds for a config."""
        return any(all(self._word(word, config) for word in either.split()) for either in condition.split(" or "))

    def _word(self, word: str, config: Mapping[str, Any]) -> bool:
        """Whether one word of a condition (see the class) holds for a config."""
        key, sign, other = re.fullmatch(r"(!?\w+?)(?:(!=|=)(\w+))?", word).groups()  # type: ignore[union-attr]
        found = config.get(key.lstrip("!"), self.defaults.get(key.lstrip("!")))
        if sign == "=":
            return bool(found == int(other))
        if sign == "!=":
            return found is not None and bool(found != config.get(other, self.defaults.get(other)))
        return bool(found) != key.startswith("!")

    def _present(self, names: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
        """The tensor names that exist under a config, by their conditions in `only_if`; others always exist."""
        return [name for name in names if name not in self.only_if or self.holds(self.only_if[name], config)]

    def block_tensors(self, config: Mapping[str, Any], index: int) -> frozenset[str]:
        """The paths of all tensors in the block with this index; blocks differ only in whether they have experts.

        Raises:
            IncompatibleError: the config does not say how many experts or heads there are, which blocks have experts,
                or how many experts process a token.
        """
        if self.layouts:
            return self.layout(index).tensors()
        config = self._with_experts(config, index)
        biased = {path for condition, paths in self.biases.items() if self.holds(condition, config) for path in paths}
        names = {
            **{f"{path}.weight": "" for path in self.linears},
            **{f"{path}.bias": "" for path in biased},
            **self.norms,
            **({f"{path}.weight": "" for path in self._expert_maps} if config.get("has_experts") else {}),
        }
        return frozenset(one for name in self._present(names, config) for one in self._every_one(name, config))

    def _every_one(self, name: str, config: Mapping[str, Any]) -> list[str]:
        """The tensor names that a name with "*" stands for, one per expert or head; any other name alone."""
        path, star, rest = name.partition(".*")
        return [f"{path}.{n}{rest}" for n in range(self.number_of(path, config))] if star else [name]

    def pattern_of(self, path: str) -> str:
        """The path in a block with "*" in place of the index of an expert or head, the form that the table uses."""
        for several in self.numbered:
            match = re.fullmatch(rf"{re.escape(several)}\.(?:0|[1-9]\d{{0,3}})(\..+)", path)
            if match:
                return f"{several}.*{match[1]}"
        return path

    @property
    def _expert_maps(self) -> dict[str, str]:
        """The linear layers of the experts and their sizes, by path in a block with "*" for the index of the expert."""
        experts = self.experts
        return {f"{experts.path}.*.{path}": sizes for path, sizes in experts.maps.items()} if experts else {}

    def _with_experts(self, config: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        """A copy of the config for conditions: with "experts" (their number) and "has_experts" (of this block)."""
        if self.experts is None:
            return config
        self.chosen_experts(config)
        count = self.number_of(self.experts.path, config)
        return {**config, "experts": count, "has_experts": self.has_experts(config, index)}

    def chosen_experts(self, config: Mapping[str, Any]) -> int:
        """The number of experts that process a token; 0 for a family without experts.

        Raises:
            IncompatibleError: the config does not say this number, or the number of all experts.
        """
        if self.experts is None:
            return 0
        count, key = self.number_of(self.experts.path, config), self.experts.chosen_key
        chosen = config.get(key, self.defaults.get(key, 1))
        if type(chosen) is not int or not 1 <= chosen <= count:
            raise IncompatibleError(
                "the config does not say how many experts a token goes through",
                reasons=[f"{key} = {str(chosen)[:60]}, expected one number from 1 to {count}"],
                next_step="correct config.json in the base folder",
            )
        return chosen

    def kinds_of_blocks(self, config: Mapping[str, Any], blocks: Iterable[int]) -> list[int]:
        """One index from `blocks` for each kind of block: with experts, and without; the first block of each kind.

        Args:
            config: the model's config.
            blocks: indices of blocks.
        """
        kinds: dict[bool, int] = {}
        for index in blocks:
            kinds.setdefault(self.has_experts(config, index), index)
        return list(kinds.values())

    def has_experts(self, config: Mapping[str, Any], index: int) -> bool:
        """Whether the block with this index has experts."""
        return self.experts is not None and bool(self.experts.where(config, index))

    def embedding_tensors(self, config: Mapping[str, Any]) -> list[str]:
        """The names of the tensors before the blocks, in a model with this config."""
        return self._present(self.embeddings, config)

    def outer_tensors(self, config: Mapping[str, Any]) -> frozenset[str]:
        """The names of all tensors outside the blocks; a tied head has no tensor of its own."""
        around = (*self.embedding_tensors(config), *self._present(self.final, config))
        return frozenset({*around, *(() if self.tied(config) or not self.head else (self.head,))})

    @property
    def head_module(self) -> str:
        """The name of the head in the torch model, which can differ from its name in files."""
        modules = {today: stored for stored, today in self.spellings.items()}
        return modules.get(self.head, self.head).removesuffix(".weight")

    def head_tensors(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of the head's own tensors; empty if the head is tied to the embedding, and for encoders."""
        if not self.head or self.tied(config):
            return ()
        bias = f"{self.head.removesuffix('.weight')}.bias"
        return (self.head, *(name for name in self._present(self.final, config) if name == bias))

    def sizes_of(self, name: str) -> str | None:
        """The sizes of a tensor as text, such as "vocab_size hidden_size"; None if the family has no such tensor.

        Args:
            name: the full name of the tensor in files.
        """
        place = self.block_of(name)
        if place is None:
            return {**self.embeddings, **self.final, self.head: self.head_size}.get(name)
        if self.layouts:
            shape = self.layout(place[0]).shape_of(place[1])
            return None if shape is None else " ".join(map(str, shape))
        path, _, kind = self.pattern_of(place[1]).rpartition(".")
        maps = {**self.linears, **self._expert_maps}
        if path in maps:
            sizes = maps[path].split()
            return {"weight": " ".join(sizes), "bias": sizes[self.transposed]}.get(kind)
        return self.norms.get(f"{path}.{kind}")

    def is_bias(self, name: str) -> bool:
        """Whether a full name is that of a bias of a linear layer or norm in a block."""
        place = self.block_of(name)
        if self.layouts:
            return place is not None and place[1].endswith(".bias") and place[1] not in self.layout(place[0]).buffers
        return place is not None and place[1].endswith("bias") and self.sizes_of(name) is not None

    def shape_problem(self, name: str, shape: Sequence[int], config: Mapping[str, Any]) -> str | None:
        """A message if a tensor's shape contradicts the config, else None; a size whose key is missing can be any."""
        sizes, place = self.sizes_of(name), self.block_of(name)
        if sizes is None:
            return None
        if place is not None and self.experts is not None and not self.layouts:
            config = {**config, "experts": self.number_of(self.experts.path, config)}
        expected = [_size(product, config) for product in sizes.split()]
        if len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True)):
            return None
        shown = ", ".join("any" if size is None else str(size) for size in expected)
        return f"{name[:120]!r} has shape {list(shape)}, the config makes it [{shown}]"

    def set_switches(self, config: Mapping[str, Any]) -> dict[str, object]:
        """The config keys that are on, although the family is supported only with these off, with their values."""
        return {key: config[key] for key in self.refused if config.get(key)}

    def output_of(self, part: RefitMap) -> tuple[str, str | None]:
        """The paths in a block of the last linear layer of MLP or attention, and of the scale after it, or None."""
        return (self.mlp_out, self.mlp_scale) if part == "mlp" else (self.attention_out, self.attention_scale)

    def output_layers(self, part: RefitMap) -> tuple[str, ...]:
        """The paths in a block of the last linear layers of MLP or attention, with "*" for the index of an expert.

        A mixture has several: those of its experts, of an expert that all tokens use, and of blocks without experts.
        """
        if part == "attention" or self.experts is None:
            return (self.output_of(part)[0],)
        return (*self.experts.others, f"{self.experts.path}.*.{self.experts.out}")

    def norms_after(self, part: RefitMap, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The norms that a block applies to the output of MLP or attention, as paths of modules, in order."""
        norms = self.mlp_norms if part == "mlp" else self.attention_norms
        return tuple(path for path, condition in norms.items() if self.holds(condition, config))

    def refit_way(self, part: RefitMap, config: Mapping[str, Any]) -> RefitWay:
        """The method by which refit finds the new output projection of MLP or attention in this family."""
        known = self.linear_residual
        if part == "attention" and self.linear_attention is not None:
            known = self.linear_attention
        if not known:
            return "as measured" if part == "mlp" else "by gradient"
        if part == "mlp" and self.experts is not None:
            return "expert by expert"
        return "in front of the norm" if self.norms_after(part, config) else "in closed form"


def _agreed(config: Mapping[str, Any], keys: Sequence[str], usual: int | None = None) -> int | None:
    """The positive integer under these config keys; `usual` if none is set, None if they disagree or are invalid."""
    found = [config[key] for key in keys if key in config] or [usual]
    return found[0] if all(type(n) is int and n == found[0] and n > 0 for n in found) else None


def _size(product: str, config: Mapping[str, Any]) -> int | None:
    """The value of a product of numbers and config keys, such as "3*n_embd"; None if a key is missing."""
    factors: list[Any] = [int(factor) if factor.isdigit() else config.get(factor) for factor in product.split("*")]
    return int(math.prod(factors)) if all(type(factor) is int for factor in factors) else None


def config_problems(config: Mapping[str, Any], family: Architecture) -> list[str]:
    """A message for each config key that a bundle may not contain, and each value that is not a plain setting."""
    problems = [f"config key {key!r} is not permitted" for key in sorted(set(config) - family.config_keys)]
    problems += [
        f"config key {key!r} holds {str(config[key])[:60]!r}, which is no plain setting"
        for key in sorted(set(config) & family.config_keys)
        if not _plain(config[key], depth=3)
    ]
    return problems


_WORD = re.compile(r"[A-Za-z0-9_.+-]{0,64}")


def _plain(value: object, depth: int) -> bool:
    """Whether a config value is plain: null, a boolean, a number or a short word.

    A list or object of plain values is plain too, if these are nested at most `depth` times.
    """
    if value is None or isinstance(value, bool | int | float):
        return True
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    if isinstance(value, list) and depth:
        return len(value) <= 4096 and all(_plain(item, depth - 1) for item in value)
    if isinstance(value, dict) and depth:
        return len(value) <= 64 and all(_plain(key, 0) and _plain(item, depth - 1) for key, item in value.items())
    return False
