"""Computes the config of a model with only some of its blocks, for a family that is not in the table.

Each config key is shortened by its form: a number of blocks, a list with an entry per block, a list of block indices,
or a number of first blocks. transformers then builds the blocks of the result. They must equal those of the base in
every tensor and every setting. Where they do not, other values of single keys are tried.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from offsite.errors import IncompatibleError

if TYPE_CHECKING:
    from torch import nn

Structure = Mapping[str, Any]  # of a block: shapes of its tensors, classes and settings of its modules
Build = Callable[[Mapping[str, Any]], Sequence["nn.Module"]]

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers")
_TOKENS = re.compile(r".*(token|_id$|label|name|architectures).*")  # lists that no model has per block
_BLOCKS = re.compile(r".*(layers?|idxs?|indices|layer_ids|_at|blocks?)$")  # keys of lists of blocks
_FIRST = re.compile(r"first_k_dense_replace|num_dense_layers|n_dense_layers|moe_layer_start_index|max_window_layers")
_INDEX = re.compile(r"(.*_)?(idx|id|index|number)|layer|block|depth")
_STEPS = (1, 2, 3)  # by how many the own numbers of one block and the next differ
_ROUNDS = 3  # keys that are changed one after the other


def block_counts(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The config keys whose value is the number of blocks, `count`, in order of preference."""
    return tuple(key for key in _COUNTS if type(config.get(key)) is int and config[key] == count)


def per_block_keys(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The config keys of lists that have one entry for each of `count` blocks."""
    return tuple(sorted(key for key, value in config.items() if _is_per_block(key, value, count)))


def _is_per_block(key: str, value: Any, count: int) -> bool:
    """Whether a config value is a list with one entry for each of `count` blocks, by its length and its key."""
    return isinstance(value, list) and len(value) == count and _TOKENS.fullmatch(key) is None


def structure_of(block: "nn.Module", index: int) -> Structure:
    """All facts that must be equal in two blocks: shapes of tensors, classes and settings of modules.

    `index` is the index of the block in its model.
    """
    found: dict[str, Any] = {"": index} | {
        f"{name} of shape": tuple(tensor.shape) for name, tensor in block.state_dict().items()
    }
    for path, module in block.named_modules():
        found[f"{path} is a"] = type(module).__name__
        for name, value in vars(module).items():
            if name.startswith("_") or name == "training" or not isinstance(value, bool | int | float | str | None):
                continue
            found[f"{path}.{name}".lstrip(".")] = value
    return found


def same_structure(one: Structure, other: Structure) -> list[str]:
    """One sentence for each difference between two blocks, given by `structure_of`; empty if there is none."""
    return [
        f"{key}: {str(one.get(key, 'not there'))[:60]}, expected {str(other.get(key, 'none'))[:60]}"
        for key in sorted(one.keys() | other.keys())
        if key and not _alike(key, one, other)
    ]


def _alike(key: str, one: Structure, other: Structure) -> bool:
    """Whether two blocks agree in the entry `key` of their structures.

    The entry may be a layer index; then it may differ as the blocks' indices do.
    """
    found, expected = one.get(key), other.get(key)
    if type(found) is float and type(expected) is float:
        return math.isclose(found, expected, rel_tol=1e-6)
    if type(found) is int and type(expected) is int and _INDEX.fullmatch(key.rpartition(".")[2]):
        apart = one[""] - other[""]
        return found == expected or any(found - expected == step * apart for step in _STEPS)
    return type(found) is type(expected) and found == expected


def cut_config(
    config: Mapping[str, Any], kept: Sequence[int], count: int, structures: Sequence[Structure], build: Build
) -> dict[str, Any]:
    """The config for a model with only the blocks `kept` of the base, in that order.

    Args:
        config: the base's config, including the values that its config class derives.
        kept: indices of the base's blocks.
        count: the number of the base's blocks.
        structures: `structure_of` each kept block in the base, in the order of `kept`.
        build: a function that builds the blocks of a config, without weights.

    Raises:
        IncompatibleError: no config was found that gives these blocks; the error lists the differences of
            the config that has the fewest.
    """
    cut = {key: _cut_value(key, value, kept, count) for key, value in config.items()}
    wrong = _differences(cut, structures, build)
    for _ in range(_ROUNDS):
        if not wrong:
            return cut
        cut, found = _nearest(config, cut, kept, count, wrong, structures, build)
        if len(found) >= len(wrong):
            break
        wrong = found
    if not wrong:
        return cut
    raise IncompatibleError(
        f"no config gives the blocks {', '.join(map(str, kept))[:80]} of this model",
        reasons=wrong[:4],
        next_step="keep other blocks, such as a whole number of the pattern in which kinds of blocks repeat",
    )


def _cut_value(key: str, value: Any, kept: Sequence[int], count: int) -> Any:
    """The value of a config key in a model with only the blocks `kept` of `count`."""
    if type(value) is int and key in _COUNTS and value == count:
        return len(kept)
    if type(value) is int and _FIRST.fullmatch(key):
        return sum(index < value for index in kept)
    if isinstance(value, dict):
        return {name: _cut_value(name, one, kept, count) for name, one in value.items()}
    if _lists_blocks(key, value, count):
        first = int(count in value)  # some count blocks from 1
        return [new + first for new, old in enumerate(kept) if old + first in value]
    if _is_per_block(key, value, count):
        return [value[index] for index in kept]
    return value


def _lists_blocks(key: str, value: Any, count: int) -> bool:
    """Whether a config value is a list of indices of blocks (from 0 or 1), for a model with `count` blocks."""
    if not isinstance(value, list) or not value or _BLOCKS.fullmatch(key) is None:
        return False
    return all(type(one) is int and 0 <= one <= count for one in value) and len(set(value)) == len(value)


def _differences(config: Mapping[str, Any], structures: Sequence[Structure], build: Build) -> list[str]:
    """How the blocks that `build` makes from a config differ from `structures`; one text for each difference.

    It is a list of 1000 entries or more if they cannot be compared.
    """
    try:
        blocks = build(config)
    except IncompatibleError as error:
        return [*error.reasons, error.what] * 1000  # further away than any config with which there are blocks
    if len(blocks) != len(structures):
        return [f"{len(blocks)} blocks, expected {len(structures)}"] * 1000
    return [
        f"block {index}: {problem}"
        for index, (block, expected) in enumerate(zip(blocks, structures, strict=True))
        for problem in same_structure(structure_of(block, index), expected)
    ]


def _nearest(
    base: Mapping[str, Any],
    cut: Mapping[str, Any],
    kept: Sequence[int],
    count: int,
    wrong: list[str],
    structures: Sequence[Structure],
    build: Build,
) -> tuple[dict[str, Any], list[str]]:
    """Change one key of the config `cut` so that its blocks differ least from the base's blocks.

    Returns the config, which is `cut` itself if no change helps, and the remaining differences. `wrong` are those of
    `cut`, and `base` is the base's config; other arguments as for `cut_config`.
    """
    best, least = dict(cut), wrong
    for changed in (*_other_lists(base, cut, kept, count), *_variants(cut, len(structures), wrong)):
        found = _differences(changed, structures, build)
        if len(found) < len(least):
            best, least = changed, found
        if not least:
            break
    return best, least


def _other_lists(
    base: Mapping[str, Any], cut: Mapping[str, Any], kept: Sequence[int], count: int
) -> Iterator[dict[str, Any]]:
    """Yield variants of the config `cut` in which one list is shortened in another way.

    The list is left whole, continued as a repeating pattern, or shortened as pairs (pattern, repetitions). `base` is
    the base's config; other arguments as for `cut_config`.
    """
    for key, value in base.items():
        if not isinstance(value, list) or not value or _TOKENS.fullmatch(key):
            continue
        repeated = [value[index % len(value)] for index in kept]
        others = [value, repeated]
        if all(isinstance(one, list) and len(one) == 2 and isinstance(one[0], list) for one in value):
            kinds = [kind for run, times in value for kind in run * times]  # runs of kinds, each with how often
            others.append([[[kinds[index % len(kinds)] for index in kept], 1]])
        yield from ({**cut, key: other} for other in others if other != cut[key])


def _variants(config: Mapping[str, Any], blocks: int, wrong: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield variants of a config in which one number is changed.

    It is a small integer whose key looks like one about blocks, or a float, which is scaled by a ratio found in
    `wrong`, the differences of the config. `blocks` is the number of blocks of the config's model.
    """
    scaled = [re.search(r": (-?\d+\.\d+), expected (-?\d+\.\d+)$", one) for one in wrong]
    ratios = {float(one[2]) / float(one[1]) for one in scaled[:1] if one and float(one[1])}
    for key, value in config.items():
        if type(value) is float:  # such as a scale of residuals that goes by the number of blocks
            yield from ({**config, key: value * ratio} for ratio in ratios)
        small = (
            type(value) is int
            and -1 <= value <= 256
            and re.search(r"layer|block|period|interval|offset|step|every|pattern|freq", key)
        )
        if small and key not in _COUNTS:
            yield from ({**config, key: other} for other in range(-1, blocks + 2) if other != value)
