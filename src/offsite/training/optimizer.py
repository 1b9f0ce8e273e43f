"""AdamW on master weights, and its state as named tensors and plain settings, for a resume point."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from offsite.training.master_weights import MasterWeights


def make_optimizer(weights: MasterWeights, weight_decay: float) -> torch.optim.AdamW:
    """Make AdamW, with one parameter group for each combination of weight decay and learning rate factor.

    Each group holds its factor under the key "rate_factor"; the caller sets "lr" before every step.

    Args:
        weights: the parameters that train.
        weight_decay: the weight decay of the names in `weights.decayed`; all others have none.
    """
    groups: list[dict[str, Any]] = [
        {
            "params": [
                master
                for name, master in weights.masters.items()
                if (name in weights.decayed) is decays and weights.rate_factors.get(name, 1.0) == factor
            ],
            "weight_decay": weight_decay if decays else 0.0,
            "rate_factor": factor,
        }
        for factor in sorted({1.0, *weights.rate_factors.values()})
        for decays in (True, False)
    ]
    fused = next(iter(weights.masters.values())).device.type in ("cpu", "cuda", "mps", "xpu")
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=fused)


def optimizer_state(
    weights: MasterWeights, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The content of `optimizer.state_dict()` with names instead of indices, for a resume point.

    Returns:
        The tensors, keyed "<AdamW's key>.<name of the weight>"; and the settings of the parameter groups, in which
        "params" lists names of weights.
    """
    state = optimizer.state_dict()
    names = _names(weights, optimizer)
    tensors = {f"{key}.{names[index]}": value for index, held in state["state"].items() for key, value in held.items()}
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return tensors, groups


def load_optimizer_state(
    weights: MasterWeights,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Restore the state that `optimizer_state` returned; torch moves each tensor to the optimiser's device.

    Args:
        weights: the weights that the optimiser updates.
        optimizer: a new optimiser with the same parameter groups.
        tensors: the saved tensors, keyed "<AdamW's key>.<name of the weight>".
        groups: the saved settings of the parameter groups.
    """
    index_of = {name: index for index, name in _names(weights, optimizer).items()}
    held: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(".")
        held.setdefault(index_of[name], {})[key] = tensor
    # whether AdamW is fused is this device's matter; where it is, the number of steps is on the device, else on the CPU
    fused = optimizer.param_groups[0]["fused"]
    indexed = [{**group, "fused": fused, "params": [index_of[name] for name in group["params"]]} for group in groups]
    optimizer.load_state_dict({"state": held, "param_groups": indexed})


def _names(weights: MasterWeights, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """The name of each weight, by its index in the optimiser's state_dict."""
    name_of = {id(master): name for name, master in weights.masters.items()}
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {index: name_of[id(parameter)] for index, parameter in enumerate(parameters)}
