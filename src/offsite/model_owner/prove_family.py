"""Tests a derived model family on the base's own weights, before anything of the base is sent.

A derived family is the description of a model type without a row in the architecture table: its blocks, embeddings,
linear layers and head, which were found from transformers' code for the type. The tests load the base's tensors as the
data owner will, and compare the logits with those of the base as transformers loads it: with all blocks, without some
blocks, with and without a cache, with an adapter and merged. If they differ, packing fails. The tests also find which
layers LoRA and bottlenecks may use.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.bundle_tensors import bundle_config
from offsite.models.backbone import split_backbone_and_head
from offsite.models.families.derive_family import hidden_size
from offsite.models.families.layouts import Layout
from offsite.models.hugging_face_calls import OFFLINE, incompatible, quiet
from offsite.models.loading import Lazy, attention_of, loading_problems
from offsite.models.mixture import experts_implementation, in_files
from offsite.models.modules.bottleneck_layers import insert_bottlenecks
from offsite.models.tokenizers import make_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offsite.model_owner.block_runner import BlockRunner

_TOKENS = 12  # of the row that all models run on
_NEW = 4  # tokens that are generated with and without a cache
_FP32_BYTES = 8 * 2**30  # larger models are compared in bf16
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest logit
_CPU = torch.device("cpu")


def prove_family(model: BaseModel) -> BaseModel:
    """Test that bundles of a base with a derived family compute the same as the base, by running both.

    Returns:
        The base with an updated family: it lists only the LoRA targets and bottleneck places that work, and says
        whether single blocks can be run.

    Raises:
        IncompatibleError: a bundle's logits differ from the base's, or the base cannot be run or its blocks dropped.
        UsageError, StorageError: the base cannot be loaded.
    """
    size = sum(tensor.size for tensor in model.tensors.values())
    dtype = torch.float32 if 2 * size <= _FP32_BYTES else torch.bfloat16
    ids = torch.arange(3, 3 + _TOKENS).remainder(_vocabulary(model))[None]  # (1, T)
    kept = _some_blocks(model)
    dropped = [index for index in range(model.blocks) if index not in kept]
    with _refusals(model), torch.no_grad():
        base = _base(model, dtype)
        whole = _logits(base, ids)
        _require_causal(base, ids, whole)
        with _skipped(base, model, dropped):
            shorter = _logits(base, ids)
        del base
        _require_equal("all blocks kept", _logits(_bundle(model, range(model.blocks), dtype), ids), whole)
        cut = _bundle(model, kept, dtype)
        _require_equal(f"blocks {dropped} dropped, as when the base skips them", _logits(cut, ids), shorter)
        _require_equal("generated with a cache", *_generated(cut, ids))
        network = split_backbone_and_head(cut)
    _require_parameters(cut, model, kept)
    with _refusals(model):
        proved = _with_targets(cut, model, kept, ids)
        plain_head = network.scale == 1 and network.body is cut.base_model
        return _with_blocks(cut, proved, kept, ids) if plain_head and dtype == torch.float32 else proved


def _vocabulary(model: BaseModel) -> int:
    """The number of tokens in the head, from the derived family's sizes."""
    return int(model.family.head_size.split()[0])


@contextlib.contextmanager
def _refusals(model: BaseModel) -> Iterator[None]:
    """Context manager: turn errors of transformers in the body into an IncompatibleError that names the base folder."""
    with quiet(), incompatible(model.folder):
        yield


def _refused(model_type: str, what: str, reasons: Sequence[str]) -> IncompatibleError:
    """The error that a model of this type cannot be packed; `what` is the first of the reasons."""
    return IncompatibleError(
        f"this {model_type} model cannot be packed",
        reasons=[what, *reasons],
        next_step="use a model of another type; docs/models.md lists those that work",
    )


def _some_blocks(model: BaseModel) -> tuple[int, ...]:
    """The indices of the blocks that remain if some blocks near the middle of the model are dropped.

    Two consecutive blocks are dropped, or another number if the per-block lists of the config are valid only then, as
    for a repeating pattern of block kinds. A choice that keeps all kinds of blocks is preferred.

    Raises:
        IncompatibleError: there is no valid config without some blocks.
    """
    count = model.blocks
    starts = sorted(range(count - 1), key=lambda start: abs(start - (count - 2) / 2))
    pairs = [(start, start + 1) for start in starts] if count > 2 else [(1,)]
    whole = [tuple(range(start, start + period)) for period in (3, 4, 6, 8) for start in starts[:1] if count > period]
    last: IncompatibleError | None = None
    choices = [*pairs[:8], *whole, *((one,) for one in range(min(count, 4)))]
    every = {dropped: tuple(index for index in range(count) if index not in dropped) for dropped in choices}
    kinds = model.family.layout_of
    by_kinds = sorted(every.values(), key=lambda kept: -len({kinds[index] for index in kept}))  # all kinds, if possible
    for kept in by_kinds:
        try:
            if kept:
                model.family.subset(model.config, kept)
                return kept
        except IncompatibleError as error:
            last = error
    raise _refused(model.family.model_type, "no block can be dropped", [last.what, *last.reasons] if last else [])


def _base(model: BaseModel, dtype: torch.dtype) -> "PreTrainedModel":
    """Load the base with transformers alone, with its eager implementations of attention and experts."""
    from transformers import AutoModelForCausalLM

    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model.folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", **OFFLINE
    )
    return loaded.eval().requires_grad_(False)


def _bundle(model: BaseModel, kept: Sequence[int], dtype: torch.dtype) -> "PreTrainedModel":
    """Load a bundle with these blocks of the base as the data owner will load it, without writing the bundle.

    `kept` are the base indices of the blocks.
    """
    from transformers import AutoModelForCausalLM

    family = model.family
    settings = bundle_config(model, kept, "F32" if dtype == torch.float32 else "BF16")
    names = {name: name for name in (*family.embeddings, *family.final, family.head) if name in model.tensors}
    for place, index in enumerate(kept):
        names |= {family.in_block(place, path): family.in_block(index, path) for path in model.block(index)}
    config = make_config(settings)
    made, info = AutoModelForCausalLM._model_mapping[type(config)].from_pretrained(
        None,
        config=config,
        state_dict={name: Lazy(model.tensors[own]) for name, own in names.items()},
        attn_implementation=attention_of(config),
        dtype=dtype,
        experts_implementation=experts_implementation(),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    problems = loading_problems(info, None)
    if problems:
        outer = (*family.embeddings, *family.final, family.head)
        sized = all(problem.startswith(tuple(f"mismatched tensor {name}:" for name in outer)) for problem in problems)
        what = (
            "tensors outside its blocks have shapes that depend on the number of blocks"
            if sized
            else "the bundle's tensors are not those of its config"
        )
        raise _refused(family.model_type, what, problems[:8])
    loaded: PreTrainedModel = made.to(_CPU).eval().requires_grad_(False)
    return loaded


def _logits(network: nn.Module, ids: Tensor) -> Tensor:
    """The logits for token ids (B, T), (B, T, V) in float32, computed without a cache."""
    found: Tensor = network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return found.float()


def _require_equal(what: str, found: Tensor, expected: Tensor) -> None:
    """Raise an error unless two tensors of logits are equal within the tolerance.

    Args:
        what: what was compared, for the error.
        found: the logits of a bundle's model.
        expected: the logits of the base.

    Raises:
        IncompatibleError: they differ, or have NaN.
    """
    apart = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
    limit = _TOLERANCE[torch.float32] * max(1.0, float(expected.abs().max()))
    if not apart <= limit:  # NaN is refused too
        raise IncompatibleError(
            "a bundle of this model would not compute what the model does",
            reasons=[f"{what}: logits differ by up to {apart:.3g}, expected at most {limit:.3g}"],
            next_step="use a model of another type; docs/models.md lists those that work",
        )


def _require_causal(network: nn.Module, ids: Tensor, logits: Tensor) -> None:
    """Raise an error unless the network is a causal language model: a token must not change earlier logits.

    Args:
        network: the base as transformers loads it.
        ids: token ids, (1, T).
        logits: the network's logits for them.

    Raises:
        IncompatibleError: a changed last token changes earlier logits, or does not change its own.
    """
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    found = _logits(network, changed)
    _require_equal("logits before a changed token", found[:, :-1], logits[:, :-1])
    if torch.equal(found[:, -1], logits[:, -1]):
        raise IncompatibleError("the logits do not depend on the last token", next_step="check the weights")


@contextlib.contextmanager
def _skipped(network: "PreTrainedModel", model: BaseModel, dropped: Sequence[int]) -> Iterator[None]:
    """Context manager: in the body, the blocks `dropped` of the base's network return their input unchanged."""

    def hand_on(_: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any], output: Any) -> Any:
        entering = arguments[0] if arguments else settings["hidden_states"]
        return type(output)([entering, *output[1:]]) if isinstance(output, tuple | list) else entering

    blocks = [network.get_submodule(model.family.block_module(index)) for index in dropped]
    handles = [block.register_forward_hook(hand_on, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _generated(network: "PreTrainedModel", ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of a few generated tokens, first with a cache and then without, (new tokens, V) each."""
    found = []
    for cache in (True, False):
        made: Any = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_NEW,
            min_new_tokens=_NEW,
            do_sample=False,
            use_cache=cache,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        found.append(torch.cat([step.float() for step in made.logits]))
    return found[0], found[1]


def _require_parameters(network: nn.Module, model: BaseModel, kept: Sequence[int]) -> None:
    """Raise an error unless the parameters of the network's blocks are exactly the tensors that the family lists.

    Args:
        network: a bundle's network with the blocks `kept`.
        model: the opened base.
        kept: base indices of the blocks.

    Raises:
        IncompatibleError: parameters are missing in the family, or the family lists others.
    """
    family = replace(model.family, layout_of=tuple(model.family.layout_of[index] for index in kept))
    for place in range(len(kept)):
        layout = family.layout(place)
        held = {name for name in in_files(family, dict(network.named_parameters())) if _inside(family, name, place)}
        listed = {family.in_block(place, path) for path in layout.tensors() if path not in layout.buffers}
        if held != listed:
            raise _refused(family.model_type, "its blocks train other tensors", sorted(held ^ listed)[:8])


def _inside(family: Any, name: str, place: int) -> bool:
    """Whether a tensor's name is one in the block with index `place`."""
    found = family.block_of(name)
    return found is not None and found[0] == place


def _with_targets(cut: "PreTrainedModel", model: BaseModel, kept: Sequence[int], ids: Tensor) -> BaseModel:
    """The base with a family that lists only the LoRA targets and bottleneck places that work.

    They are tried in one block of each kind of the family's blocks (its layouts).

    Args:
        cut: a bundle's network with the blocks `kept`.
        model: the opened base.
        kept: base indices of the blocks.
        ids: token ids to run, (1, T).
    """
    family = model.family
    places = {family.layout_of[index]: place for place, index in reversed(list(enumerate(kept)))}
    layouts = list(family.layouts)
    for kind, place in places.items():
        layouts[kind] = _works(cut, family.block_module(place), layouts[kind], family.transposed, ids)
    for kind, layout in enumerate(layouts):
        if kind not in places:  # no block of this kind is among those that were kept
            layouts[kind] = replace(layout, linears=(), attention_out="", mlp_out="")
    return replace(model, family=replace(family, layouts=tuple(layouts)))


def _works(cut: "PreTrainedModel", block: str, layout: Layout, transposed: bool, ids: Tensor) -> Layout:
    """A kind of block (its layout) with only those LoRA targets and bottleneck places that work.

    LoRA works on a layer if its logits equal those of the merged weights. A bottleneck works after a layer if it gets a
    gradient, and changes nothing at first.

    Args:
        cut: a bundle's network.
        block: path in it of a block of this kind.
        layout: the kind of block.
        transposed: whether linear layers store their weights as (in, out).
        ids: token ids to run, (1, T).
    """
    linears = [path for path in layout.linears if _adapter_equals_merged(cut, [f"{block}.{path}"], transposed, ids)]
    outputs = {path: path if _bottleneck_trains(cut, f"{block}.{path}", ids) else "" for path in layout.outputs}
    return replace(
        layout,
        linears=tuple(linears),
        attention_out=outputs.get(layout.attention_out, ""),
        mlp_out=outputs.get(layout.mlp_out, ""),
    )


def _adapter_equals_merged(cut: "PreTrainedModel", targets: Sequence[str], transposed: bool, ids: Tensor) -> bool:
    """Whether LoRA on these layers changes the logits, and changes them in the same way after it is merged.

    The network is restored afterwards.

    Args:
        cut: the network.
        targets: paths of linear layers in it.
        transposed: whether linear layers store their weights as (in, out).
        ids: token ids to run, (1, T).
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = _without_gradient(cut, ids)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=list(targets), fan_in_fan_out=transposed, bias="none", init_lora_weights=False
    )
    parents = {target: cut.get_submodule(target.rpartition(".")[0]) for target in targets}
    originals = {target: cut.get_submodule(target) for target in targets}
    try:
        inject_adapter_in_model(config, cut)
        layers = {name: one for name, one in cut.named_modules() if isinstance(one, BaseTunerLayer)}
        if layers.keys() != set(targets):
            return False
        with torch.no_grad():
            for name, parameter in cut.named_parameters():
                if ".lora_" in name:
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        adapted = _without_gradient(cut, ids)
        for layer in layers.values():
            layer.merge()
        merged = _without_gradient(cut, ids)
        for layer in layers.values():
            layer.unmerge()
    # PEFT has no one error for a layer without LoRA: some classes fail when wrapped, others when run or merged
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError):
        return False
    finally:
        for target, parent in parents.items():
            setattr(parent, target.rpartition(".")[2], originals[target])
        if hasattr(cut, "peft_config"):
            del cut.peft_config
    limit = _TOLERANCE[adapted.dtype] * max(1.0, float(plain.abs().max()))
    alike = float((adapted - merged).abs().max()) <= limit
    return alike and float((adapted - plain).abs().max()) > 0


def _without_gradient(network: nn.Module, ids: Tensor) -> Tensor:
    """`_logits` without a graph for gradients."""
    with torch.no_grad():
        return _logits(network, ids)


def _bottleneck_trains(cut: "PreTrainedModel", place: str, ids: Tensor) -> bool:
    """Whether a bottleneck after the layer at `place` gets a gradient, and changes no logits at first."""
    parent, _, name = place.rpartition(".")
    owner, original = cut.get_submodule(parent), cut.get_submodule(place)
    plain = _without_gradient(cut, ids)
    try:
        hidden = hidden_size(cut)
        added = insert_bottlenecks(cut, [place], hidden, 2)
        found = _logits(cut, ids)
        torch.autograd.backward(found.square().sum())
        trains = all(parameter.grad is not None for parameter in added.values())
        return trains and bool(torch.allclose(found.detach(), plain, atol=1e-5 * max(1.0, float(plain.abs().max()))))
    except (ValueError, TypeError, RuntimeError, AttributeError, StopIteration):
        return False
    finally:
        setattr(owner, name, original)


def _with_blocks(cut: "PreTrainedModel", model: BaseModel, kept: Sequence[int], ids: Tensor) -> BaseModel:
    """The base with a family that says whether single blocks can be run, as calibration and healing need it.

    It also says whether a block's output is linear in the outputs of its MLP and its attention, for refit. Only
    families with one kind of block and without experts are tried; other families remain as they are.

    Args:
        cut: a bundle's network with the blocks `kept`.
        model: the opened base.
        kept: base indices of the blocks.
        ids: token ids to run, (1, T).
    """
    from offsite.kernels.runtime import Runtime
    from offsite.model_owner.block_runner import BlockRunner

    family, layout = model.family, model.family.layouts[0]
    stacked = any(len(shape) > 2 for shape in layout.shapes.values())
    if len(family.layouts) > 1 or stacked or not layout.mlp_out or not layout.attention_out:
        return model
    runner = BlockRunner(model, Runtime(_CPU, torch.float32))
    linear = {"mlp": True, "attention": True}
    try:
        for place in (0, len(kept) - 1):
            entering, leaving = _states_of(cut, family.block_module(place), ids)
            loaded = runner.load(kept[place])
            if place == 0 and not _close(loaded.embed(ids), entering):
                return model
            if not _close(loaded(ids, entering), leaving):
                return model
            for part, path in (("mlp", layout.mlp_out), ("attention", layout.attention_out)):
                linear[part] &= _is_linear(runner, model, kept[place], path, ids, entering)
    except (IncompatibleError, RuntimeError, TypeError, KeyError, IndexError, AttributeError):
        return model
    proved = replace(
        family,
        runs_by_block=True,
        linear_residual=linear["mlp"],
        linear_attention=linear["mlp"] and linear["attention"],
    )
    return replace(model, family=proved)


def _states_of(network: nn.Module, block: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The input and the output of the block at path `block` when the network runs, (1, T, H) each."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any], output: Any) -> None:
        seen.append(arguments[0] if arguments else settings["hidden_states"])
        seen.append(output[0] if isinstance(output, tuple | list) else output)

    handle = network.get_submodule(block).register_forward_hook(keep, with_kwargs=True)
    try:
        _without_gradient(network, ids)
    finally:
        handle.remove()
    return seen[0], seen[1]


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal within the tolerance of float32."""
    limit = _TOLERANCE[torch.float32] * max(1.0, float(expected.abs().max()))
    return found.shape == expected.shape and float((found - expected).abs().max()) <= limit


def _is_linear(runner: "BlockRunner", model: BaseModel, index: int, path: str, ids: Tensor, entering: Tensor) -> bool:
    """Whether a block's output is linear in the output of one of its layers.

    The layer's weight is multiplied by 1, 2 and 3; then the block's output must change by the same amount twice.

    Args:
        runner: loads the block.
        model: the opened base.
        index: the block's index in the base.
        path: the layer's path in the block.
        ids: token ids, (1, T).
        entering: the block's input, (1, T, H).
    """
    from offsite.models.torch_tensors import read_tensor

    name = f"{path}.weight"
    weight = read_tensor(model.block(index)[name], torch.float32)
    first, second, third = (runner.load(index, {name: weight * times})(ids, entering) for times in (1, 2, 3))
    return _close(third - second, second - first) and not torch.equal(first, second)
