"""Models without weights, for weights that are there already: no memory for parameters, and no random numbers."""

import contextlib
from collections.abc import Iterator

from accelerate import init_empty_weights
from transformers.initialization import no_init_weights


@contextlib.contextmanager
def without_weights(*, buffers: bool = True) -> Iterator[None]:
    """While this holds, what transformers makes of a config has its parameters on the meta device, and nothing tied.

    Without the second switch transformers draws every parameter all the same: two thirds of the time.

    Args:
        buffers: compute these, since no file has them; False leaves them on the meta device as well.
    """
    with init_empty_weights(include_buffers=not buffers), no_init_weights():
        yield
