"""Dropout on a CPU that uses a random generator per thread and is about six times faster than torch's.

torch's draws from one generator for the whole process, so what passes side by side get would depend on which asks
first; and its `bernoulli_` takes as long as 20 sums of the same size, on one thread.
"""

import threading
from typing import Any, Self

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LEVELS = 2**16  # random numbers that are compared have 16 bits
_PATTERNS = {2: torch.int16, 4: torch.int32}  # integers as wide as a number

_here = threading.local()


class OwnRandomness(TorchFunctionMode):
    """Within, what this thread computes drops numbers by a generator of its own; other threads are left alone.

    Args:
        state: of the generator, as another's `state` was; or a seed.
    """

    def __init__(self, state: torch.Tensor | int) -> None:
        super().__init__()
        self._generator = torch.Generator()
        if isinstance(state, int):
            self._generator.manual_seed(state)
        else:
            self._generator.set_state(state)

    @property
    def state(self) -> torch.Tensor:
        """The state of the random generator."""
        return self._generator.get_state()

    def draw(self) -> int:
        """Draw the next seed."""
        return int(torch.randint(2**62, (), generator=self._generator))

    def __enter__(self) -> Self:
        self._before = own_randomness()
        _here.own = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _here.own = self._before

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Dropout of this file in the place of torch's."""
        if func is F.dropout:
            return self._dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(
        self, given: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        dropped = round(p * LEVELS)
        known = given.device.type == "cpu" and given.is_floating_point() and given.element_size() in _PATTERNS
        if inplace or not training or not known or not 0 < dropped < LEVELS:
            return F.dropout(given, p, training, inplace)
        left: torch.Tensor = _Dropped.apply(given, dropped, self._generator)  # type: ignore[no-untyped-call]
        return left


def own_randomness() -> OwnRandomness | None:
    """What this thread is within, the innermost."""
    own: OwnRandomness | None = getattr(_here, "own", None)
    return own


def drawn_seed() -> int:
    """A seed of what this thread is within, else of torch's own generator."""
    own = own_randomness()
    return own.draw() if own is not None else int(torch.randint(2**62, ()))


def draw_keep_mask(numbers: torch.Tensor, dropped: int, generator: torch.Generator) -> torch.Tensor:
    """Which of so many numbers stay: of 65,536 all but `dropped`. As integers of all bits or none, for `mask_`.

    64 random bits at a time, and a comparison into integers: torch's into booleans, and products with those, are five
    times slower.
    """
    words = torch.empty(-(-numbers.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    drawn = words.view(torch.int16)[: numbers.numel()].view(numbers.shape)
    mask = torch.empty(numbers.shape, dtype=_PATTERNS[numbers.element_size()])
    return torch.ge(drawn, dropped - LEVELS // 2, out=mask).neg_()


def mask_(numbers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Set all values that `keep_mask` does not keep to zero, in place."""
    numbers.view(mask.dtype).bitwise_and_(mask)
    return numbers


def masked(numbers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As `mask_`, of a copy."""
    return (numbers.view(mask.dtype) & mask).view(numbers.dtype)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, dropped: int, generator: torch.Generator) -> torch.Tensor:
        ctx.scale = LEVELS / (LEVELS - dropped)
        keep_mask = draw_keep_mask(given, dropped, generator)
        ctx.save_for_backward(keep_mask)
        return mask_(given * ctx.scale, keep_mask)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (keep_mask,) = ctx.saved_tensors
        return mask_(gradients[0] * ctx.scale, keep_mask), None, None
