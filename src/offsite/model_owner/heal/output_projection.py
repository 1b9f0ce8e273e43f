"""The last linear layer of a block's attention or MLP, and the least squares problem for its new weights."""

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from offsite.config import RefitMap
from offsite.model_owner.block_runner import LoadedBlock, captured_inputs
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.held_norm import hold_norm
from offsite.model_owner.heal.measured_response import Response, measure_response
from offsite.model_owner.heal.ridge import RidgeProblem


@dataclass(frozen=True)
class OutputProjection:
    """A linear layer with F inputs and H outputs, and the least squares problem for its weights, in float64.

    If `linear`, the block's output is linear in the layer's output as long as the statistics of norms between them stay
    fixed. Then the problem has a solution in closed form.
    """

    path: str  # path in the block, as checkpoint files name it
    module: str  # path in the block's torch module
    transposed: bool  # whether checkpoint files store the weight as (F, H)
    weight: Tensor  # (H, F)
    bias: Tensor | None  # (H,)
    scale: Tensor | None  # (H,): factor by which the block multiplies each output of the layer
    problem: RidgeProblem
    linear: bool = True  # whether the problem describes the real block; if not, only its Gram matrix is correct
    held: bool = False  # whether norms follow, whose statistics the problem treats as constants

    def gram(self) -> Tensor:
        """The Gram matrix of the layer's inputs, (F, F) in float32.

        Tokens have the same weights as in the ridge regression.
        """
        inputs = self.weight.shape[1]
        return self.problem.gram()[:inputs, :inputs]

    def solve(self) -> tuple[Tensor, Tensor | None]:
        """The weight (H, F) and bias (H,) that bring the block's output closest to its targets, by ridge regression."""
        return self.moved(self.problem.change())

    def moved(self, change: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """The layer's weight (H, F) and bias (H,) after a fraction of a change is added to them.

        Args:
            change: a solution of the problem, (F, H), or (F + 1, H) with a bias.
            share: the fraction, from 0 to 1.
        """
        inputs = self.weight.shape[1]
        if self.scale is not None:  # outputs with a scale close to 0 do not change
            change = change * torch.where(self.scale.abs() > 1e-6 * self.scale.abs().max(), 1 / self.scale, 0.0)
        change = share * change
        return self.weight + change[:inputs].T, None if self.bias is None else self.bias + change[inputs]

    def tensors(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """A weight (H, F) and a bias (H,) of this layer in float32, with the names and layout of checkpoint files.

        Keys are paths in the block.
        """
        found = {f"{self.path}.weight": weight.T if self.transposed else weight}
        if bias is not None:
            found[f"{self.path}.bias"] = bias
        return {name: value.detach().float().contiguous() for name, value in found.items()}


def output_projection(
    problem: BlockProblem, found: Mapping[str, Tensor], part: RefitMap, layer: str
) -> OutputProjection:
    """Run a block over all batches, and set up the least squares problem for the last layer of its MLP or attention.

    Args:
        problem: the block, with its inputs and targets.
        found: tensors of the block that earlier steps changed, keyed by their path in the block, as checkpoint files
            name it.
        part: "mlp" or "attention".
        layer: the layer's path in the block, one of the family's `output_layers` of that part.
    """
    family, block = problem.family, problem.load(found)
    parameters, names = dict(block.module.named_parameters()), family.modules
    _, scale = family.output_of(part)
    path = names.get(f"{layer}.weight", f"{layer}.weight").removesuffix(".weight")
    weight, bias = parameters[f"{path}.weight"].double(), parameters.get(f"{path}.bias")
    factor = parameters.get(names.get(scale, scale)) if scale else None
    weight = weight.T if family.transposed else weight
    outputs, inputs = weight.shape
    way = family.refit_way(part, problem.config)
    response = Response(known=way != "by gradient", norms=family.norms_after(part, problem.config))
    if way == "as measured":
        response = measure_response(block, path, problem.batches[0], problem.enters[0])
    ridge = RidgeProblem(inputs, outputs, len(problem.batches), weight.device, bias=bias is not None)
    for position, ids in enumerate(problem.batches):
        with captured_inputs(block, [path, *response.norms]) as seen:
            after = block(ids, problem.enters[position])
        held = [hold_norm(block.module.get_submodule(norm), seen[norm]) for norm in response.norms]
        factors = [norm.inverse for norm in held]  # (N, 1) each
        gated = family.experts is not None and part == "mlp"  # a gate may multiply an expert that all tokens use
        if gated or response.scale is not None:
            factors.append(_gate(block, path, ids, problem.enters[position], after, response.scale))
        of_token = functools.reduce(operator.mul, factors) if factors else None
        ridge.add(position, seen[path], after, problem.targets[position], of_token)
    gains = [*(norm.gain for norm in held), *(one for one in (factor, response.scale) if one is not None)]
    return OutputProjection(
        path=layer,
        module=path,
        transposed=family.transposed,
        weight=weight,
        bias=None if bias is None else bias.double(),
        scale=functools.reduce(operator.mul, gains).double() if gains else None,
        problem=ridge,
        linear=response.known,
        held=bool(response.norms),
    )


def _gate(
    block: LoadedBlock, path: str, ids: Tensor, enters: Tensor, after: Tensor, scale: Tensor | None = None
) -> Tensor:
    """The factor by which the block multiplies a layer's output for each token, (N, 1).

    It is measured: a constant is added to the layer's outputs, and the change of the block's output is divided by it.

    Args:
        block: the loaded block.
        path: the layer's path in the block's torch module.
        ids: the token ids or pixels of the batch.
        enters: the block's inputs, (B, T, H).
        after: the block's outputs, (B, T, H).
        scale: the block's further factor for each channel, (H,); None if there is none.
    """
    step = float(after.abs().mean()) or 1.0
    raised = block.module.get_submodule(path).register_forward_hook(lambda _, __, output: output + step)
    try:
        risen = block(ids, enters)
    finally:
        raised.remove()
    rise = (risen - after).flatten(0, -2) / step  # (N, H)
    if scale is None:
        return rise.mean(-1, keepdim=True)
    return rise @ scale[:, None] / scale.square().sum().clamp_min(1e-12)
