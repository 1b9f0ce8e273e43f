"""Running a base model block by block: at any time one block's weights are in memory, whatever the model's size."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from offsite.core.load import attention_of, read_tensor
from offsite.core.mixture import experts_implementation, in_files
from offsite.core.runtime import Runtime
from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.split import subset_config


class _ReachedBlock(Exception):  # noqa: N818  a signal, caught where it is raised for
    def __init__(self, hidden: Tensor, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        super().__init__()
        self.hidden, self.arguments, self.settings = hidden, arguments, settings


@dataclass(frozen=True)
class LoadedBlock:
    """One block with its weights, and what the model around it hands to a block beside the hidden state."""

    module: nn.Module
    surrounding: nn.Module
    compute: torch.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """What enters the first block: ids (B, T) -> hidden (B, T, H) in float32."""
        return self._reach(ids).hidden.float()

    def __call__(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """One block's forward pass: ids (B, T) for positions and masks, hidden (B, T, H) -> (B, T, H) in float32."""
        call = self._reach(ids)
        with torch.no_grad(), self._autocast():
            output = self.module(hidden, *call.arguments, **call.settings)
        after: Tensor = output[0] if isinstance(output, tuple) else output
        return after.float()

    def _reach(self, ids: Tensor) -> _ReachedBlock:
        def stop(_: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
            raise _ReachedBlock(arguments[0], arguments[1:], settings)

        handle = self.module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), self._autocast():
                self.surrounding(input_ids=ids, use_cache=False)
        except _ReachedBlock as reached:
            return reached.with_traceback(None)  # which would keep the callers' frames, and all they hold, in a cycle
        finally:
            handle.remove()
        raise IncompatibleError(f"{type(self.surrounding).__name__} does not call its blocks with the hidden state")

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        device = next(self.module.parameters()).device.type
        return torch.autocast(device, self.compute, enabled=self.compute != torch.float32)


class BlockRunner:
    """Loads single blocks of a base; the hidden state stays in float32, matrix products run in the machine's dtype."""

    def __init__(self, model: BaseModel, machine: Runtime) -> None:
        self._model, self._device, self._compute = model, machine.device, machine.dtype
        self._outer = {name: self._read(name) for name in model.row.embedding_tensors(model.config)}

    def load(self, index: int, replaced: Mapping[str, Tensor] | None = None) -> LoadedBlock:
        """One block of the base, with some of its tensors (by path in the block) replaced."""
        row = self._model.row
        config = AutoConfig.for_model(**subset_config(self._model, [index]))
        with init_empty_weights(include_buffers=False):
            surrounding = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention_of(config), experts_implementation=experts_implementation()
            )
        block = surrounding.get_submodule(row.in_block(0, "").rstrip("."))
        block.load_state_dict(self._weights(index, block, replaced or {}), strict=True, assign=True)
        for name, value in self._outer.items():
            path, _, leaf = name.rpartition(".")
            setattr(surrounding.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
        return LoadedBlock(block.eval(), surrounding.base_model.eval(), self._compute)

    def _weights(self, index: int, block: nn.Module, replaced: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of a block, by path in the module; stacks of experts are filled matrix by matrix."""
        row, start = self._model.row, self._model.row.in_block(index, "")
        stacks = {
            path: torch.empty(parameter.shape, device=self._device)
            for path, parameter in block.named_parameters()
            if row.stacked(start + path, 0) is not None
        }
        matrices = in_files(row, {start + path: stack for path, stack in stacks.items()})
        weights = dict(stacks)
        for path in self._model.block(index):
            value = replaced[path].to(self._device) if path in replaced else self._read(start + path)
            if start + path in matrices:
                matrices[start + path].copy_(value)
            else:
                weights[row.modules.get(path, path)] = value
        return weights

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._model.tensors[name], torch.float32).to(self._device)


@contextlib.contextmanager
def captured_input(block: LoadedBlock, path: str) -> Iterator[list[Tensor]]:
    """While the block runs, collect what enters one of its linear maps."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])

    handle = block.module.get_submodule(path).register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
