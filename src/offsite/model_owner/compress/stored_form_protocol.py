"""The functions that the Python file of a stored form must define. Torch-free.

A stored form is a way to store compressed blocks in a bundle: quantised, low-rank or sparse matrices, or narrower MLPs.
The functions declare it in the bundle's config, and make a block's tensors smaller or encode a matrix.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol, cast, runtime_checkable

import numpy.typing as npt

from offsite.config import PackSpec, StoredForm
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.carry_map import Narrowed
from offsite.model_owner.compress.smallest_weights import Array
from offsite.models.families.family import Architecture
from offsite.models.modules.declared import Declared


@runtime_checkable
class DeclaringForm(Protocol):
    """Protocol of all stored forms, the ways to store compressed blocks; each is a Python file of this folder.

    Each form is also a `MatrixEncoding` or a `BlockReshaping`.
    """

    def declare(self, model: BaseModel, spec: PackSpec) -> Mapping[str, Any]:
        """The values of the fields of `Declared` that describe this form in the bundle's config.

        Raises:
            IncompatibleError: the family's blocks cannot be stored in this form.
        """


@runtime_checkable
class MatrixEncoding(DeclaringForm, Protocol):
    """Protocol of stored forms that replace the matrix of a linear layer by other tensors, such as codes and scales."""

    def encode(self, weight: Array, declared: Declared) -> Mapping[str, npt.NDArray[Any]]:
        """The tensors that store a matrix (outputs, inputs), keyed by the last part of their names, such as "scales".

        The caller rounds float32 tensors to the bundle's dtype.
        """


@runtime_checkable
class BlockReshaping(DeclaringForm, Protocol):
    """Protocol of stored forms that make tensors of a block smaller, before they are pruned or encoded."""

    def reshape(
        self, family: Architecture, read: Callable[[str], Array], declared: Declared
    ) -> Callable[[str, Array], Array]:
        """A function that makes a tensor smaller, given its path in the block and its values in the base.

        Args:
            family: the model's row of the architecture table.
            read: reads a tensor of the block, given its path in the block.
            declared: what the bundle's config declares of the emulator's blocks, such as their number of neurons.
        """

    def kept_features(self, family: Architecture, read: Callable[[str], Array], declared: Declared) -> Narrowed:
        """The inputs and outputs of each layer that remain in the smaller block; arguments as for `reshape`.

        The ledger's `CarryMap` needs them to map an adapter of such a layer to the base's shape.
        """


def form_of(row: StoredForm) -> DeclaringForm:
    """Import the Python file of a stored form."""
    return cast(DeclaringForm, import_module(row.module))
