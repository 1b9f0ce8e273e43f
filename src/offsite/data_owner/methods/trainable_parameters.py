"""Checks that the trainable parameters are exactly those that the manifest permits."""

from collections.abc import Mapping

import torch

from offsite.errors import IncompatibleError
from offsite.protocol.manifest import TensorEntry


def require_exactly(trainable: Mapping[str, torch.Tensor], expected: Mapping[str, TensorEntry]) -> None:
    """Refuse trainable parameters whose names or shapes are not exactly those that the manifest permits.

    Args:
        trainable: the trainable parameters, by their names in the return.
        expected: the permitted tensors, by the same names.

    Raises:
        IncompatibleError: they differ; every difference is listed.
    """
    problems = [f"{name} would train, which the manifest does not list" for name in sorted(trainable.keys() - expected)]
    problems += [
        f"{name} is listed in the manifest, but does not train" for name in sorted(expected.keys() - trainable)
    ]
    problems += [
        f"{name}: found shape {list(trainable[name].shape)}, expected {list(expected[name].shape)}"
        for name in sorted(trainable.keys() & expected)
        if tuple(trainable[name].shape) != expected[name].shape
    ]
    if problems:
        raise IncompatibleError(
            "what would train is not what the bundle's manifest says",
            reasons=problems,
            next_step="ask the model's owner for a bundle made by a current version of offsite",
        )
