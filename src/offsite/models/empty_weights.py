"""Builds models without allocating or initialising weights, for callers that assign existing weights afterwards."""

import contextlib
from collections.abc import Iterator

from accelerate import init_empty_weights
from transformers.initialization import no_init_weights


@contextlib.contextmanager
def without_weights(*, buffers: bool = True) -> Iterator[None]:
    """Context manager: in its body, transformers builds models with all parameters on the meta device and none tied.

    It also turns off random initialisation, which otherwise takes two thirds of the time even on the meta device.

    Args:
        buffers: whether buffers are computed, since no file contains them; False leaves them on the meta device too.
    """
    with init_empty_weights(include_buffers=not buffers), no_init_weights():
        yield
