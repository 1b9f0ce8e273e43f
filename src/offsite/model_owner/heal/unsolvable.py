"""Explains why a block's least squares problem has no solution: activations of the base that are not finite."""

import contextlib
from collections.abc import Iterator

import torch

from offsite.errors import IncompatibleError

Unsolvable: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not list it


@contextlib.contextmanager
def explain_unsolvable(block: int) -> Iterator[None]:
    """Context manager: replace torch's error that a matrix cannot be factorised or solved by one with advice.

    Args:
        block: the block's index in the base, for the message.

    Raises:
        IncompatibleError: the body raised `Unsolvable`.
    """
    try:
        yield
    except Unsolvable as error:
        raise IncompatibleError(
            f"what goes through the base gives no equations to solve for block {block}",
            reasons=[
                str(error)[:200],
                "its weights, or those of a block near it, may hold values that are not finite",
            ],
            next_step="check the base's weights; or drop blocks with --keep, and pack with --heal none",
        ) from None
