"""Refit by gradient, for blocks whose output is not linear in the output of the layer to fit, or not known to be.

Each iteration makes a step along the gradient of the squared error, multiplied by the inverse of the Gram matrix of the
layer's inputs. If a change of the layer's output changed the block's output by the same amount, the first step would be
the solution in closed form. The length of a step is optimal if the block is linear along it. It is halved until the
error falls on held-out batches; if it does not fall, the iterations end.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from offsite.model_owner.block_runner import LoadedBlock
from offsite.model_owner.heal.block_error import block_error, judged_positions, token_weights
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.output_projection import OutputProjection
from offsite.model_owner.heal.ridge import USUAL_RIDGE, ridge_solution

TURNS = 4
_HALVINGS = 4


def follow_gradient(
    problem: BlockProblem, found: Mapping[str, Tensor], layer: OutputProjection
) -> tuple[Tensor, Tensor | None]:
    """The weight (H, F) and bias (H,) of a layer after gradient steps that reduce the block's error on its targets.

    Args:
        problem: the block, with its inputs and targets.
        found: tensors of the block that earlier steps changed, keyed by their path in the block, as checkpoint files
            name it.
        layer: the layer with its current weight and bias.
    """
    judged = judged_positions(problem)
    fitted = [position for position in range(len(problem.batches)) if position not in judged] or list(judged)
    weight, bias = layer.weight, layer.bias

    def load(weight: Tensor, bias: Tensor | None) -> LoadedBlock:
        block = problem.load({**found, **layer.tensors(weight, bias)})
        block.module.requires_grad_(False)
        return block

    def moved(length: float, direction: Tensor) -> tuple[Tensor, Tensor | None]:
        change = length * direction  # (F, H), or with a bias (F + 1, H)
        inputs = weight.shape[1]
        return weight + change[:inputs].T, None if bias is None else bias + change[inputs]

    block = load(weight, bias)
    least = block_error(problem, block, judged)
    for _ in range(TURNS):
        slope = _slope(problem, block, layer, fitted)
        direction = ridge_solution(layer.problem.gram(), slope, USUAL_RIDGE)
        length = _length(problem, block, load(*moved(1.0, direction)), fitted)
        for _ in range(_HALVINGS):
            candidate = moved(length, direction)
            block = load(*candidate)
            error = block_error(problem, block, judged)
            if error < least:
                break
            length /= 2
        else:
            return weight, bias
        least, (weight, bias) = error, candidate
    return weight, bias


def _slope(problem: BlockProblem, block: LoadedBlock, layer: OutputProjection, positions: Sequence[int]) -> Tensor:
    """Half the negative gradient of the block's weighted squared error with respect to the layer's weight and bias.

    Args:
        problem: the block's inputs and targets.
        block: the loaded block.
        layer: the layer of the block.
        positions: indices of the batches over which the error is summed.

    Returns:
        (F, H), or (F + 1, H) with a bias, in float32.
    """
    slopes = []
    for position in positions:
        target = problem.targets[position]
        with _output_as_leaf(block.module.get_submodule(layer.module)) as calls, torch.enable_grad():
            after = block.differentiable(problem.batches[position], problem.enters[position])
            error = (token_weights(target) * (target - after).square()).sum()
        inputs, output = calls[-1]
        (gradient,) = torch.autograd.grad(error, output)
        features = inputs.flatten(0, -2).float()  # (N, F)
        if layer.bias is not None:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        slopes.append(features.T @ gradient.flatten(0, -2).float() / -2)
    return torch.stack(slopes).sum(0)


@contextlib.contextmanager
def _output_as_leaf(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Context manager: make a layer's output a leaf of the autograd graph.

    The yielded list gets the inputs and the output of each call of the layer.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def cut(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        calls.append((arguments[0].detach(), leaf))
        return leaf

    handle = module.register_forward_hook(cut)
    try:
        yield calls
    finally:
        handle.remove()


def _length(problem: BlockProblem, before: LoadedBlock, after: LoadedBlock, positions: Sequence[int]) -> float:
    """The length of a step that minimises the block's error, if the block's output is linear along the step.

    Args:
        problem: the block's inputs and targets.
        before: the block before the step.
        after: the block after a step of length 1.
        positions: indices of the batches to measure on.
    """
    along, square = 0.0, 0.0
    for position in positions:
        ids, enters, target = problem.batches[position], problem.enters[position], problem.targets[position]
        now = before(ids, enters)
        rise, weights = after(ids, enters) - now, token_weights(target)
        along += float((weights * rise * (target - now)).sum())
        square += float((weights * rise.square()).sum())
    return along / square if square else 0.0
