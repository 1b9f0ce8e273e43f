"""Changes the advice in errors about a bundle's files: the data owner cannot correct a signed file."""

import contextlib
from collections.abc import Iterator

from offsite.errors import IncompatibleError


@contextlib.contextmanager
def as_sent() -> Iterator[None]:
    """Context manager: an IncompatibleError in its body advises to ask the model's owner for another bundle.

    The functions that open models also serve the model's owner, so by default their errors advise to correct the files.
    """
    try:
        yield
    except IncompatibleError as error:
        raise type(error)(
            error.what,
            reasons=error.reasons,
            next_step="ask the model's owner for another bundle, and send this message along; "
            "nothing in a signed bundle can be corrected",
        ) from error
