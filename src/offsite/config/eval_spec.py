"""The settings of `offsite eval`."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from offsite.config.runtime_settings import RuntimeSettings
from offsite.config.setting_types import Chosen, Columns, LongRows, Workers
from offsite.config.spec import FILE_ONLY, Spec


class EvalSpec(Spec):
    """The settings of `offsite eval`."""

    if TYPE_CHECKING:  # every setting is a keyword argument, by its key

        def __init__(self, **settings: Any) -> None: ...

    max_length: Annotated[int, Field(ge=8, description="longest row in tokens")] = 1024
    long_rows: LongRows = "error"
    columns: Columns = None
    chosen: Chosen = False
    micro_batch_tokens: Annotated[int, Field(ge=1, description="padded tokens that run at once"), FILE_ONLY] = 8192
    max_rows: Annotated[int | None, Field(ge=1, description="score the first rows only")] = None
    skip_bad: Annotated[bool, Field(description="images: leave out pictures that cannot be read")] = False
    micro_batch_images: Annotated[int, Field(ge=1, description="images: pictures that run at once"), FILE_ONLY] = 32
    workers: Workers = None
    runtime: RuntimeSettings = RuntimeSettings()
