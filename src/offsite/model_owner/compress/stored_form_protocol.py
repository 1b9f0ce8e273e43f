"""The functions that the module of a stored form defines. Torch-free.

They declare the form in the bundle's config, and change a block's shapes or encode a matrix.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol, cast, runtime_checkable

import numpy.typing as npt

from offsite.config import PackSpec, StoredForm
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.carry_map import Narrowed
from offsite.model_owner.compress.smallest_weights import Array
from offsite.models.family import Architecture
from offsite.models.modules.declared import Declared


@runtime_checkable
class DeclaringForm(Protocol):
    """Protocol: a module of this folder with a stored form; it is also a `MatrixEncoding` or a `BlockReshaping`."""

    def declare(self, model: BaseModel, spec: PackSpec) -> Mapping[str, Any]:
        """The fields of `Declared` that describe this form.

        Raises:
            IncompatibleError: the family's blocks cannot have this form.
        """


@runtime_checkable
class MatrixEncoding(DeclaringForm, Protocol):
    """Protocol: a form that stores the matrix of a linear layer as other tensors, such as codes and scales."""

    def encode(self, weight: Array, declared: Declared) -> Mapping[str, npt.NDArray[Any]]:
        """The tensors that store a matrix (outputs, inputs), keyed by the last part of their names.

        The caller rounds those in float32 to the bundle's dtype.
        """


@runtime_checkable
class BlockReshaping(DeclaringForm, Protocol):
    """Protocol: a form that makes tensors of a block smaller, before they are pruned or encoded."""

    def reshape(
        self, family: Architecture, read: Callable[[str], Array], declared: Declared
    ) -> Callable[[str, Array], Array]:
        """A function from a tensor's path in the block and its values to its values in the smaller block.

        Args:
            family: the model's row of the architecture table.
            read: returns a tensor of the block, given its path.
            declared: the declaration of the emulator's modules.
        """

    def kept_features(self, family: Architecture, read: Callable[[str], Array], declared: Declared) -> Narrowed:
        """The inputs and outputs that the layers of the smaller block keep, for the same arguments as `reshape`.

        The owner's map needs them to carry an adapter on such a layer to the base's shape.
        """


def form_of(row: StoredForm) -> DeclaringForm:
    """Load the file of a stored form."""
    return cast(DeclaringForm, import_module(row.module))
