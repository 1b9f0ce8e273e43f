"""Maps the tensor names in a base's files to those in its torch model, by transformers' own table of conversions."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offsite.errors import IncompatibleError
from offsite.models.families.family import Experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUMBER = re.compile(r"(.+?)\.(0|[1-9]\d{0,3})\.(.+)\.weight")


@dataclass(frozen=True)
class StoredNames:
    """How the tensor names in a base's files correspond to the parameter names of its torch model.

    `today` maps names in files to parameter names; None stands for tensors that transformers ignores. `experts`
    describes the stacked parameters for which files have one matrix per expert.
    """

    today: Mapping[str, str | None] = field(default_factory=dict)
    experts: Experts | None = None
    counts: Mapping[int, int] = field(default_factory=dict)  # index of a block -> number of its experts in files

    def in_files(self, state: Mapping[str, tuple[int, ...]], index: int) -> tuple[dict[str, tuple[int, ...]], int]:
        """Convert the parameter shapes of a block to the shapes in files, where stacked experts are single matrices.

        Args:
            state: the shapes, by path in the block in the torch model.
            index: the index of the block.

        Returns:
            The shapes by path in files, with "*" for the index of an expert; and the number of experts, or 0.

        Raises:
            IncompatibleError: the stacks do not have as many experts as the files.
        """
        experts, count = self.experts, self.counts.get(index, 0)
        if experts is None or not count:
            return dict(state), 0
        shapes: dict[str, tuple[int, ...]] = {}
        for path, shape in state.items():
            module, _, leaf = path.rpartition(".")
            if module != experts.module or leaf not in experts.stacks:
                shapes[path] = shape
                continue
            maps = experts.stacks[leaf]
            if shape[0] != count or shape[1] % len(maps):
                raise IncompatibleError(f"{path} stacks {shape[0]} experts, the files hold {count}")
            for name in maps:
                shapes[f"{experts.path}.*.{name}.weight"] = (shape[1] // len(maps), shape[2])
        return shapes, count


def map_stored_names(model: "PreTrainedModel", blocks: str, stored: Collection[str]) -> StoredNames:
    """Map the tensor names in a base's files to the parameter names of its model, as transformers does.

    Args:
        model: the model, on the meta device.
        blocks: the path of its list of blocks.
        stored: the names in the files.

    Raises:
        IncompatibleError: transformers converts values of these files, and not only their names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    state = dict(model.state_dict())
    ignored = [re.compile(one) for one in model._keys_to_ignore_on_load_unexpected or ()]
    today: dict[str, str | None] = {}
    parts: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))  # stack -> expert's path -> numbers
    where: dict[str, str] = {}
    for name in sorted(stored):
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is None or key == name or _is_whole(name, key, state):
            known = key in state
            today[name] = None if not known and any(one.search(key) or one.search(name) for one in ignored) else key
            continue
        converter = next(one for one in converters if pattern in one.source_patterns)
        _require_merge(converter, key)
        match = _NUMBER.fullmatch(name[_block_start(name, key, blocks) :])
        if match is None:
            raise IncompatibleError(f"transformers converts {name}, which is no matrix of one expert")
        canonical = key[: _block_start(key, key, blocks)] + match[0]
        today[name] = canonical
        parts[key][match[3]].add(int(match[2]))
        where[key] = match[1]
    experts, counts = _experts(parts, where, blocks, converters) if parts else (None, {})
    return StoredNames(today, experts, counts)


def _is_whole(name: str, key: str, state: Mapping[str, Any]) -> bool:
    """Whether a tensor of a file is a whole stack of experts, although its name matches the pattern for parts of one.

    Args:
        name: the tensor's name in the file.
        key: the name to which transformers converts it.
        state: the tensors of the torch model, by name.
    """
    return key in state and _NUMBER.fullmatch(name.rpartition(".layers.")[2].partition(".")[2]) is None and name == key


def _block_start(name: str, key: str, blocks: str) -> int:
    """The position in the full tensor name `name` at which the path in the block begins.

    `key` is the name to which transformers converts it, and `blocks` the path of the list of blocks.

    Raises:
        IncompatibleError: the tensor is outside the blocks.
    """
    last = blocks.rpartition(".")[2]
    match = re.search(rf"(?:^|\.){re.escape(last)}\.\d+\.", name)
    if match is None:
        raise IncompatibleError(f"transformers converts {name}, which lies outside the blocks")
    return match.end()


def _require_merge(converter: Any, key: str) -> None:
    """Check that transformers' `converter` only stacks the matrices of experts to the parameter `key`.

    Raises:
        IncompatibleError: the conversion does something else.
    """
    operations = [type(one).__name__ for one in converter.operations]
    dims = [getattr(one, "dim", 0) for one in converter.operations]
    if operations not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) or dims != [0, 1][: len(dims)]:
        raise IncompatibleError(
            f"transformers computes {key} from the tensors in the files ({', '.join(operations)})",
            reasons=["save the model again with `save_pretrained(folder, save_original_format=False)`"],
        )


def _experts(
    parts: Mapping[str, Mapping[str, set[int]]], where: Mapping[str, str], blocks: str, converters: Any
) -> tuple[Experts, dict[int, int]]:
    """The description of the experts for which files have single matrices, and their number by index of the block.

    Args:
        parts: for each stacked parameter, its linear layers and the indices of experts in the files.
        where: for each stacked parameter, the path of the experts in a block in files.
        blocks: the path of the list of blocks.
        converters: transformers' conversions, whose order is that of the layers in a stack.

    Raises:
        IncompatibleError: experts are missing, or blocks store them in different ways.
    """
    stacks: dict[str, tuple[str, ...]] = {}
    modules, paths = set(), set(where.values())
    counts: dict[int, int] = {}
    for key, maps in parts.items():
        start = _block_start(key, key, blocks)
        module, _, leaf = key[start:].rpartition(".")
        modules.add(module)
        order = [one for converter in converters for one in converter.source_patterns]
        ordered = tuple(sorted(maps, key=lambda name: _place(name, order)))
        if stacks.setdefault(leaf, ordered) != ordered:
            raise IncompatibleError(f"the experts of its blocks are stored in two ways: {stacks[leaf]}, {ordered}")
        numbers = set.union(*maps.values())
        if any(one != set(range(len(numbers))) for one in maps.values()):
            raise IncompatibleError(f"the files do not hold every expert of {key}")
        counts[int(key[:start].rstrip(".").rpartition(".")[2])] = len(numbers)
    if len(modules) != 1 or len(paths) != 1:
        raise IncompatibleError(f"its blocks hold experts at {len(modules)} places, expected one")
    maps_of = {name: "" for names in stacks.values() for name in names}
    return (
        Experts(paths.pop(), modules.pop(), maps_of, next(reversed(maps_of)), stacks),
        counts,
    )


def _place(name: str, patterns: list[str]) -> int:
    """The index of the first pattern that contains a linear layer's name; the number of patterns if none does."""
    return next((place for place, pattern in enumerate(patterns) if name in pattern.replace("\\", "")), len(patterns))
