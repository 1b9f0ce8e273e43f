"""How a foreign checkpoint becomes a base folder."""

from typing import Annotated

from pydantic import Field

from offsite.config.choices import Dtype
from offsite.config.spec import FILE_ONLY, Spec


class ImportSpec(Spec):
    """The settings of `offsite import`."""

    dtype: Annotated[
        Dtype | None, Field(description="dtype to store; left out: the checkpoint's (bf16 for GGUF)"), FILE_ONLY
    ] = None
    image_size: Annotated[
        int | None,
        Field(ge=1, le=4096, description="ONNX: side in pixels of the images that the model is given"),
        FILE_ONLY,
    ] = None
