"""The names that a base's files have for the tensors of a model, by transformers' own table of conversions."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offsite.errors import IncompatibleError
from offsite.models.family import Experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUMBER = re.compile(r"(.+?)\.(0|[1-9]\d{0,3})\.(.+)\.weight")


@dataclass(frozen=True)
class StoredNames:
    """How a base's files name the tensors of a model.

    `today` maps the names in files to those that transformers' modules have; None stands for tensors that transformers
    leaves out. `experts` says which stacks of the modules the files hold matrix by matrix.
    """

    today: Mapping[str, str | None] = field(default_factory=dict)
    experts: Experts | None = None
    counts: Mapping[int, int] = field(default_factory=dict)  # block -> number of its experts in files

    def in_files(self, state: Mapping[str, tuple[int, ...]], index: int) -> tuple[dict[str, tuple[int, ...]], int]:
        """The shapes of a block's tensors with the experts as in files, by path, and the number of its experts."""
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
    """Map the names in a base's files to those of a model's modules, as transformers does when it loads them.

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
    """Whether a file holds a whole stack, although a pattern for its parts matches its name."""
    return key in state and _NUMBER.fullmatch(name.rpartition(".layers.")[2].partition(".")[2]) is None and name == key


def _block_start(name: str, key: str, blocks: str) -> int:
    """Where the path in the block starts in a full name."""
    last = blocks.rpartition(".")[2]
    match = re.search(rf"(?:^|\.){re.escape(last)}\.\d+\.", name)
    if match is None:
        raise IncompatibleError(f"transformers converts {name}, which lies outside the blocks")
    return match.end()


def _require_merge(converter: Any, key: str) -> None:
    """Raise an error unless a conversion only stacks matrices of experts.

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
    """The experts that the files hold matrix by matrix, and their number in each block."""
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
    return next((place for place, pattern in enumerate(patterns) if name in pattern.replace("\\", "")), len(patterns))
