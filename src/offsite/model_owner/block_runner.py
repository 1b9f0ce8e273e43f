"""Runs a base model block by block: only one block's weights are in memory at a time, whatever the model's size.

Only training or scoring a whole emulator loads more: all its blocks and, on request, top blocks, final norm and head.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from offsite.errors import IncompatibleError
from offsite.kernels import labelled_cross_entropy
from offsite.kernels.runtime import Runtime
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.bundle_tensors import subset_config
from offsite.models.block_widths import Shapes, goes_with_a_unit, narrower_widths, widths_of
from offsite.models.empty_weights import without_weights
from offsite.models.loading import attention_of, encoder_keywords
from offsite.models.mixture import experts_implementation, in_files
from offsite.models.modules.affine_map import Affine, stand_behind
from offsite.models.modules.declared import AFFINE_BIAS, AFFINE_WEIGHT
from offsite.models.modules.narrow_block import narrow_block
from offsite.models.tokenizers import make_config
from offsite.models.torch_tensors import read_tensor
from offsite.storage.safetensors_files import TensorRange

_OTHER_TYPE = "choose a model of another type; docs/models.md lists those that are tested"


class _ReachedBlock(Exception):  # noqa: N818  not an error: stops a forward pass, and is caught by its caller
    """Stops a forward pass in front of a block; has the block's input and its other arguments."""

    def __init__(self, hidden: Tensor, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        super().__init__()
        self.hidden, self.arguments, self.settings = hidden, arguments, settings


@dataclass(frozen=True)
class LoadedBlock:
    """One block with its weights, inside a model without other blocks.

    The model around the block computes its inputs other than the hidden state, such as masks and position embeddings.
    """

    module: nn.Module
    surrounding: nn.Module
    compute: torch.dtype
    vision: bool = False

    def embed(self, ids: Tensor) -> Tensor:
        """The base's embeddings, which are the first block's input: ids (B, T) or pixels (B, 3, Y, X) -> (B, T, H).

        The result is in float32.
        """
        return self._reach(ids).hidden.float()

    def __call__(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Run the block: hidden (B, T, H) -> hidden (B, T, H) in float32.

        Masks and position embeddings are computed from `ids`, token ids (B, T) or pixels (B, 3, Y, X).
        """
        with torch.no_grad():
            return self.differentiable(ids, hidden)

    def differentiable(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Run the block as `__call__` does, but with gradients, unless the caller has turned them off."""
        call = self._reach(ids)
        with self._autocast():
            output = self.module(hidden, *call.arguments, **call.settings)
        return _state(output).float()

    def _reach(self, ids: Tensor) -> _ReachedBlock:
        """Run the model up to the block, and return the arguments with which it calls the block."""

        def stop(_: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
            raise _ReachedBlock(arguments[0], arguments[1:], settings)

        handle = self.module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), self._autocast():
                if self.vision:
                    self.surrounding(pixel_values=ids)
                else:
                    self.surrounding(input_ids=ids, use_cache=False)
        except _ReachedBlock as reached:
            return reached.with_traceback(None)  # the traceback would keep the callers' frames in memory
        finally:
            handle.remove()
        raise IncompatibleError(
            f"{type(self.surrounding).__name__} does not call its blocks with the hidden state", next_step=_OTHER_TYPE
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        device = next(self.module.parameters()).device.type
        return torch.autocast(device, self.compute, enabled=self.compute != torch.float32)


class _LeftStack(Exception):  # noqa: N818  not an error: stops a forward pass, and is caught by its caller
    """Stops a forward pass after the emulator's last block; has the hidden state (B, T, H)."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass(frozen=True)
class LoadedStack:
    """The blocks of an emulator with their weights, in a model; a block that is used several times is loaded once."""

    parameters: Mapping[str, nn.Parameter]  # of the blocks, by their names in the base's torch model
    whole: nn.Module  # the model that contains the blocks; it has final norm and head only if they were loaded
    blocks: Sequence[nn.Module]  # of the emulator, then those after it
    watched: int  # number of blocks of the emulator
    cap: float | None  # c in logits = c * tanh(logits / c); None if the model does not cap logits
    vision: bool = False

    def __call__(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Run the emulator's blocks on one batch, with gradients, and return the hidden state after them, (B, T, H).

        Args:
            ids: token ids (B, T), or pixels (B, 3, Y, X), from which the model computes masks and position embeddings.
            hidden: the input of the first block, (B, T, H); replaces the embedding's output.
        """

        def leave(_: nn.Module, __: object, output: Any) -> None:
            raise _LeftStack(_state(output))

        handle = self.blocks[self.watched - 1].register_forward_hook(leave)
        try:
            with self._entering(hidden):
                if self.vision:
                    self.whole(pixel_values=ids.to(hidden.dtype))
                else:
                    self._body(input_ids=ids, use_cache=False)
        except _LeftStack as left:
            return left.with_traceback(None).hidden
        finally:
            handle.remove()
        raise IncompatibleError(f"{type(self.whole).__name__} does not call its blocks in order", next_step=_OTHER_TYPE)

    def to_the_end(self, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Run the emulator's blocks, the blocks after them, and the head, on one batch; arguments as for `__call__`.

        Returns:
            The hidden state after the emulator's blocks, (B, T, H), and the mean next-token cross-entropy in nats.
        """
        seen: list[Tensor] = []
        handle = self.blocks[self.watched - 1].register_forward_hook(lambda _, __, output: seen.append(_state(output)))
        try:
            with self._entering(hidden):
                last = self._body(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
        finally:
            handle.remove()
        head: nn.Linear = self.whole.get_output_embeddings()  # type: ignore[operator]
        rows = last[:, :-1].flatten(0, 1)
        total, _ = labelled_cross_entropy(rows, head.weight, ids[:, 1:].flatten(), head.bias, self.cap)
        return seen[0], total / len(rows)

    @property
    def _body(self) -> nn.Module:
        body: nn.Module = self.whole.base_model  # type: ignore[assignment]
        return body

    @contextlib.contextmanager
    def _entering(self, hidden: Tensor) -> Iterator[None]:
        """Context manager: replace the first block's input by `hidden` in the body."""

        def replace(
            _: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (hidden, *arguments[1:]), settings

        handle = self.blocks[0].register_forward_pre_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _state(output: Any) -> Tensor:
    """The hidden state in a block's output, which is a tensor or a tuple that starts with it."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


class BlockRunner:
    """Loads blocks of a base to run them; hidden states are float32, matrix products run in the compute dtype.

    Args:
        model: the opened base.
        machine: the device, and the compute dtype.
    """

    def __init__(self, model: BaseModel, machine: Runtime) -> None:
        self._model, self._device, self._compute = model, machine.device, machine.dtype
        self._outer = {name: self._read(name) for name in model.family.embedding_tensors(model.config)}

    def load(self, index: int, replaced: Mapping[str, Tensor] | None = None) -> LoadedBlock:
        """Load one block of the base, given its index.

        `replaced` has new tensors for it, keyed by path in the block as in checkpoint files; None keeps the base's. If
        they include an affine layer, it runs after the block. If they have fewer heads, neurons or experts, the block
        becomes narrower.
        """
        family = self._model.family
        surrounding = self._skeleton([index])
        block = surrounding.get_submodule(family.block_module(0))
        start, changed = family.in_block(index, ""), replaced or {}

        def read(name: str) -> Tensor:
            path = name.removeprefix(start)
            return changed[path].to(self._device) if path in changed else self._read(name)

        self._narrow(index, block, {path: tuple(value.shape) for path, value in changed.items()})
        block.load_state_dict(self._weights(index, block, read, torch.float32), strict=True, assign=True)
        if AFFINE_WEIGHT in changed:
            stand_behind(block, Affine(read(start + AFFINE_WEIGHT), read(start + AFFINE_BIAS)))
        for name, value in self._outer.items():
            path, _, leaf = family.module_of(name).rpartition(".")
            setattr(surrounding.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
        body = surrounding if family.vision is not None else surrounding.base_model  # without the head
        return LoadedBlock(block.eval(), body.eval(), self._compute, family.vision is not None)

    def stack(
        self, emulator: Sequence[int], after: Sequence[int], changed: Mapping[str, TensorRange], *, whole: bool
    ) -> LoadedStack:
        """Load the emulator's blocks in the compute dtype, with `requires_grad` false.

        Args:
            emulator: base indices of the emulator's blocks, in order.
            after: base indices of the blocks that run after the emulator, in order.
            changed: tensors that replace the base's, and tensors of affine layers after blocks; keys are tensor names
                in the base's files.
            whole: whether to load final norm and head too, which `LoadedStack.to_the_end` needs.
        """
        family, model = self._model.family, self._model
        indices = (*emulator, *after)
        surrounding = self._skeleton(indices)

        def read(name: str) -> Tensor:
            tensor = changed[name] if name in changed else model.tensors[name]
            return read_tensor(tensor, self._compute).to(self._device)

        parameters: dict[str, nn.Parameter] = {}
        for place, index in enumerate(indices):
            block = surrounding.get_submodule(family.block_module(place))
            start, inside = f"{family.block_module(index)}.", family.in_block(index, "")
            narrower = {
                name.removeprefix(inside): one.shape for name, one in changed.items() if name.startswith(inside)
            }
            self._narrow(index, block, narrower)
            if not any(name.startswith(start) for name in parameters):
                weights = self._weights(index, block, read, self._compute)
                parameters |= {
                    start + path: nn.Parameter(value, requires_grad=False) for path, value in weights.items()
                }
            held = {name.removeprefix(start): value for name, value in parameters.items() if name.startswith(start)}
            block.load_state_dict(held, strict=True, assign=True)
            if inside + AFFINE_WEIGHT in changed:
                stand_behind(block, Affine(read(inside + AFFINE_WEIGHT), read(inside + AFFINE_BIAS)))
        around = family.outer_tensors(model.config) if whole else family.embedding_tensors(model.config)
        for name in around:
            path, _, leaf = family.module_of(name).rpartition(".")
            # in some families, the head's name in modules differs from its name in files
            owner = surrounding.get_output_embeddings() if name == family.head else surrounding.get_submodule(path)
            setattr(owner, leaf, nn.Parameter(read(name), requires_grad=False))
        if whole:
            surrounding.tie_weights()
        blocks = [surrounding.get_submodule(family.block_module(place)) for place in range(len(indices))]
        cap = getattr(surrounding.config, family.logit_cap) if family.logit_cap else None
        return LoadedStack(parameters, surrounding.eval(), blocks, len(emulator), cap, family.vision is not None)

    def _skeleton(self, indices: Sequence[int]) -> Any:
        """Build a torch model with only the blocks of these base indices; its parameters have no values yet."""
        settings = subset_config(self._model, indices)
        if (
            self._model.family.vision is not None
        ):  # an encoder's config also has a list of its blocks, which is not used here
            settings = {key: value for key, value in settings.items() if key in self._model.family.config_keys}
        config = make_config(settings)
        with without_weights():
            return (AutoModel if self._model.family.vision else AutoModelForCausalLM).from_config(
                config,
                attn_implementation=attention_of(config),
                experts_implementation=experts_implementation(),
                **encoder_keywords(self._model.family, config),
            )

    def _narrow(self, index: int, block: nn.Module, changed: Shapes) -> None:
        """Remove heads, neurons and experts from a block without values, so that its changed tensors fit.

        Args:
            index: the block's index in the base.
            block: the block's torch module.
            changed: the shapes of its changed tensors, keyed by path in the block.
        """
        family, tensors = self._model.family, self._model.block(index)
        shapes = {path: tensor.shape for path, tensor in tensors.items()}
        if all(shapes.get(path, shape) == shape for path, shape in changed.items()):
            return
        base = widths_of(family, self._model.config, shapes)
        narrow_block(block, family, shapes, base, narrower_widths(family, base, changed))

    def _weights(
        self, index: int, block: nn.Module, read: Callable[[str], Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Read the parameters of a block, keyed by their path in the block's torch module.

        If the module stacks the matrices of all experts in one parameter, they are read into it one by one.

        Args:
            index: the block's index in the base.
            block: the block's torch module.
            read: reads a tensor, given its name in the base's files.
            dtype: the dtype in which `read` returns tensors.
        """
        family, start = self._model.family, self._model.family.in_block(index, "")
        stacks = {
            path: torch.empty(parameter.shape, device=self._device, dtype=dtype)
            for path, parameter in block.named_parameters()
            if family.stacked(start + path, 0) is not None
        }
        matrices = in_files(family, {start + path: stack for path, stack in stacks.items()})
        weights, own = dict(stacks), dict(block.named_parameters())
        for path in self._model.block(index):
            name = family.modules.get(path, path)
            if start + path in matrices:
                matrices[start + path].copy_(read(start + path))
            elif name in own or not goes_with_a_unit(family, path):  # a narrower block has fewer of these
                weights[name] = read(start + path)
        return weights

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._model.tensors[name], torch.float32).to(self._device)


@contextlib.contextmanager
def captured_inputs(block: LoadedBlock, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Context manager: record the inputs of some linear layers of a block that runs in the body.

    `paths` are the layers' paths in the block's torch module. The yielded dict maps each path to the input of the last
    call of the layer.
    """
    seen: dict[str, Tensor] = {}

    def keep(path: str, arguments: tuple[Any, ...]) -> None:
        seen[path] = arguments[0]

    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.enter_context(_observed(block, path, functools.partial(keep, path)))
        yield seen


@contextlib.contextmanager
def captured_routing(block: LoadedBlock, path: str) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Context manager: record the inputs of the experts of a mixture-of-experts block that runs in the body.

    `path` is the path of the experts' module in the block's torch module. The yielded list gets one entry for each
    call: hidden states (N, H), indices of the chosen experts (N, K), and the factor of each chosen expert's output
    (N, K).
    """
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    with _observed(block, path, lambda arguments: seen.append((arguments[0], arguments[1], arguments[2]))):
        yield seen


@contextlib.contextmanager
def _observed(block: LoadedBlock, path: str, observe: Callable[[tuple[Any, ...]], None]) -> Iterator[None]:
    """Context manager: call `observe` with the positional arguments of each call of the submodule at `path`."""
    handle = block.module.get_submodule(path).register_forward_pre_hook(lambda _, arguments: observe(arguments))
    try:
        yield
    finally:
        handle.remove()
