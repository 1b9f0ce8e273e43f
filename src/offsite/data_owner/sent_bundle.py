"""Reports what is wrong with a bundle as a matter for its sender: the data owner cannot correct a signed file."""

import contextlib
from collections.abc import Iterator

from offsite.errors import IncompatibleError


@contextlib.contextmanager
def as_sent() -> Iterator[None]:
    """In the `with` block, errors about the bundle's own files advise to ask the model's owner for another one.

    The code that opens models is shared with the model's owner, whom its errors advise to correct the files.
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
