"""Runs a model whose weights are mapped from files, with a small part of them in memory at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offsite.storage.mapped_files import MappedTensors

_PART_BYTES = 8 * 2**20  # of a weight, that a matrix product reads at once
_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.mm.default, _ATEN.mm.out, _ATEN.addmm.default, _ATEN.addmm.out)  # the last arguments are matrices


class ReleasedWeights(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager: in its body, each operation of torch releases the mapped weights that it has read.

    A product with a matrix is computed part by part of the matrix, in float32, and rounded once. That is how low
    precision is computed where the CPU has no instructions for it, and much faster there than torch's own way.

    Args:
        mapped: the tensors from which the model was loaded; other weights are left in memory.
    """

    def __init__(self, mapped: MappedTensors) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mapped = mapped

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation, and release the mapped tensors among its arguments."""
        named = kwargs or {}
        if func in _PRODUCTS and self._is_large(args[-1]) and named.keys() <= {"out"}:
            *bias, left, right = args
            product = self._product(left, right)
            if bias:
                product += bias[0].float()
            return named["out"].copy_(product) if named else product.to(left.dtype)
        result = func(*args, **named)
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                self._release(one)
        return result

    def _is_large(self, matrix: Tensor) -> bool:
        """Whether a matrix is mapped, and larger than what is read at once."""
        return matrix.nbytes > _PART_BYTES and self._mapped.holds(matrix.data_ptr())

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """left (N, K) times right (K, M) in float32; right is mapped, and read in the order of its file."""
        left, rows = left.float(), right.T if right.stride(0) == 1 else right  # rows as in the file
        product = left.new_zeros(len(left), right.shape[1])
        step = max(1, _PART_BYTES // (rows.shape[1] * rows.itemsize))
        # one buffer for all parts: the heap would keep a freed one for each
        buffer = left.new_empty(step, rows.shape[1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            values = buffer[: len(part)].copy_(part)
            self._release(part)
            if rows is right:
                product += left[:, start : start + step] @ values
            else:
                product[:, start : start + step] = left @ values.T
        return product

    def _release(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu" and tensor.numel():
            last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
            self._mapped.release(tensor.data_ptr(), (last + 1) * tensor.itemsize)
