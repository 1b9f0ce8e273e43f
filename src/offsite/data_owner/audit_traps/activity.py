"""Runs tokens through a bundle's blocks, and measures how often each feature is active and how selective each row is.

A trap that tells which words stood in the rows needs features that are silent for all other words: a feature that is
active for many tokens gets a gradient from all of them, and its trained weights say nothing about one word.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite.data_owner.audit_traps.block_layers import matrices_of
from offsite.models.blocks import unwrapped_block
from offsite.models.families.family import Architecture
from offsite.models.mixture import expert_inner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROW = 64  # tokens in a sequence; fewer if the model has fewer positions
_FAINT = 0.01  # an activity below this share of the usual one does not count as active
_TOKENS_OF_EXPERTS = 256  # tokens that are run through every expert


@dataclass(frozen=True)
class FeatureActivity:
    """How active each input feature of a layer is over the tokens."""

    usual: Tensor  # (F,) the median over tokens of the absolute value, in units of the median feature's RMS
    active: Tensor  # (F,) the share of tokens for which the absolute value is over 1 % of that unit


@dataclass
class Selectivity:
    """How far the output of each row is from its usual value for one token, over all tokens so far."""

    centre: Tensor  # (R,) the median over a sample of tokens
    scale: Tensor  # (R,) the robust standard deviation over this sample
    first: Tensor  # (R,) the largest deviation in units of `scale`
    second: Tensor  # (R,) the largest deviation of another token
    token: Tensor  # (R,) the id of the token with the largest deviation

    def update(self, outputs: Tensor, ids: Tensor) -> None:
        """Take in the outputs (N, R) for the tokens `ids` (N,)."""
        deviation = ((outputs.float() - self.centre) / self.scale).abs()
        best, where = deviation.topk(min(2, len(deviation)), dim=0)  # (2, R)
        merged = torch.stack([self.first, self.second, *best])
        order = merged.sort(dim=0, descending=True).values
        self.token = torch.where(best[0] > self.first, ids[where[0]], self.token)
        self.first, self.second = order[0], order[1]


@dataclass
class Activity:
    """The measurements of one block: features by the path of the layer that they enter, rows by the path of theirs."""

    features: dict[str, FeatureActivity] = field(default_factory=dict)
    rows: dict[str, Selectivity] = field(default_factory=dict)


class _Enough(Exception):  # noqa: N818  a signal, caught where it is raised for
    """Raised after the last block that is needed."""


def token_sample(model: "PreTrainedModel", count: int, generator: torch.Generator) -> Tensor:
    """Draw tokens of the whole vocabulary, (N, T), without repetition as long as the vocabulary lasts."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    length = _length_of(model)
    rows = max(1, -(-count // length))
    drawn: list[Tensor] = []
    while sum(map(len, drawn)) < rows * length:
        drawn.append(torch.randperm(vocabulary, generator=generator))
    return torch.cat(drawn)[: rows * length].view(rows, length)


def distinct_tokens(model: "PreTrainedModel", generator: torch.Generator, most: int, at_once: int) -> Iterator[Tensor]:
    """Yield tokens of the vocabulary in random order, none twice, in parts (N, T) of `at_once` sequences.

    These are all tokens, or `most` of them.

    Each sequence starts with one more token, as the first token of a sequence is not measured.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    length = _length_of(model) - 1
    order = torch.randperm(vocabulary, generator=generator)[:most]
    whole = order[: len(order) // length * length].view(-1, length)
    parts = [*torch.split(whole, at_once), order[len(whole) * length :][None]]
    for part in parts:
        if part.numel():
            yield torch.cat([part[:, -1:], part], dim=1)


def _length_of(model: "PreTrainedModel") -> int:
    """The number of tokens in a sequence: 64, or the model's number of positions if that is smaller."""
    return min(_ROW, int(getattr(model.config, "max_position_embeddings", _ROW) or _ROW))


def noise_pictures(model: "PreTrainedModel", count: int, generator: torch.Generator) -> Tensor:
    """Draw pictures of noise at several scales, (N, channels, Y, X), with values around zero as after normalisation."""
    config: Any = model.config
    size, channels = config.image_size, int(getattr(config, "num_channels", 3))
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    pictures = []
    for number in range(count):
        coarse = max(1, 2 ** (number % 5))
        cells = torch.randn(1, channels, -(-height // coarse), -(-width // coarse), generator=generator)
        pictures.append(nn.functional.interpolate(cells, size=(height, width)))
    return torch.cat(pictures)


@torch.no_grad()
def measure_activity(
    model: "PreTrainedModel", family: Architecture, places: Sequence[int], inputs: Tensor
) -> dict[int, Activity]:
    """Run tokens or pictures through the model, and measure the features and rows of some blocks.

    Args:
        model: the bundle's model, in eval mode.
        family: its family.
        places: the indices of the blocks to measure, ascending.
        inputs: token ids (N, T), or pictures (N, C, Y, X).

    Returns:
        The measurements by the block's index.
    """
    blocks: Any = model.get_submodule(family.module_blocks or family.blocks)
    found = {place: Activity() for place in places}
    with contextlib.ExitStack() as hooks:
        for place in places:
            hooks.enter_context(_measured(blocks[place], family, found[place], inputs))
        hooks.enter_context(_stopping(blocks[places[-1]]))
        _run(model, inputs)
    return found


@torch.no_grad()
def measure_vocabulary(
    model: "PreTrainedModel", family: Architecture, place: int, rows: dict[str, Selectivity], ids: Tensor
) -> None:
    """Run tokens up to one block, and update the selectivity of this block's rows in place.

    Args:
        model: the bundle's model.
        family: its family.
        place: the block's index.
        rows: the selectivity by path, with centre and scale from `measure_activity`.
        ids: the tokens, (N, T).
    """
    blocks: Any = model.get_submodule(family.module_blocks or family.blocks)
    with contextlib.ExitStack() as hooks:
        for matrix in matrices_of(blocks[place], family):
            if matrix.module is not None and matrix.path in rows:
                hooks.enter_context(_updated(matrix.module, rows[matrix.path], ids))
        hooks.enter_context(_stopping(blocks[place]))
        _run(model, ids)


def _run(model: "PreTrainedModel", inputs: Tensor) -> None:
    """Run a model's body, until a hook stops it."""
    body: Any = model.base_model
    name = "pixel_values" if inputs.dim() == 4 else "input_ids"
    parameter = next(model.parameters())
    given = inputs.to(parameter.device, parameter.dtype if inputs.dim() == 4 else None)
    more = {} if inputs.dim() == 4 else {"use_cache": False}
    with contextlib.suppress(_Enough):
        body(**{name: given}, **more)


@contextlib.contextmanager
def _stopping(block: nn.Module) -> Iterator[None]:
    """Context manager: the model stops after this block."""

    def stop(*_: object) -> None:
        raise _Enough

    handle = block.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _measured(block: nn.Module, family: Architecture, found: Activity, inputs: Tensor) -> Iterator[None]:
    """Context manager: measure the layers of a block in one forward pass.

    Args:
        block: the block.
        family: the model's family.
        found: receives the measurements.
        inputs: what the model runs on; the first token of each sequence is left out, as models treat it specially.
    """
    handles = [
        matrix.module.register_forward_hook(_observer(matrix.path, found, inputs))
        for matrix in matrices_of(block, family)
        if matrix.module is not None
    ]
    if family.experts is not None:
        for path, module in unwrapped_block(block).named_modules():
            if path == family.experts.module:
                handles.append(module.register_forward_hook(_observer_of_experts(path, found)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observer(path: str, found: Activity, inputs: Tensor) -> Any:
    """A forward hook for a linear layer."""

    def observe(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        entered, left = arguments[0], output
        if not isinstance(left, Tensor) or entered.dim() < 2:
            return
        found.features[path] = feature_activity(_tokens(entered, inputs))
        if inputs.dim() == 2 and left.shape[:-1].numel() == inputs.numel():
            outputs = _tokens(left, inputs)
            centre = outputs.median(dim=0).values
            scale = 1.4826 * (outputs - centre).abs().median(dim=0).values
            empty = torch.zeros_like(centre)
            found.rows[path] = Selectivity(centre, scale.clamp_min(1e-12), empty, empty.clone(), empty.long())

    return observe


def _observer_of_experts(path: str, found: Activity) -> Any:
    """A forward hook for a stack of experts, which runs some tokens through each of them, whatever the router chose."""

    def observe(module: Any, arguments: tuple[Any, ...], _: Any) -> None:
        hidden = arguments[0].flatten(0, -2)[:_TOKENS_OF_EXPERTS]
        for number in range(int(module.num_experts)):
            found.features[f"{path}.{number}"] = feature_activity(expert_inner(module, number, hidden).float())

    return observe


@contextlib.contextmanager
def _updated(module: nn.Module, rows: Selectivity, ids: Tensor) -> Iterator[None]:
    """Context manager: update the selectivity of a layer's rows in one forward pass over the tokens `ids` (N, T)."""

    def observe(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        rows.update(_tokens(output, ids), ids[:, 1:].flatten().to(output.device))

    handle = module.register_forward_hook(observe)
    try:
        yield
    finally:
        handle.remove()


def _tokens(values: Tensor, inputs: Tensor) -> Tensor:
    """The values of all tokens but the first of each sequence, (N, F) in float32, from (N, T, F) or (N * T, F)."""
    batch = values.reshape(len(inputs), -1, values.shape[-1])
    return batch[:, 1:].flatten(0, 1).float()


def feature_activity(values: Tensor) -> FeatureActivity:
    """Measure the activity of features from their values for each token, (N, F)."""
    size = values.abs()
    unit = size.square().mean(dim=0).sqrt().median().clamp_min(1e-30)
    return FeatureActivity(size.median(dim=0).values / unit, (size > _FAINT * unit).float().mean(dim=0))
