"""The settings of `offsite import`, which makes a base folder from another format."""

from typing import Annotated

from pydantic import Field

from offsite.config.setting_types import Dtype
from offsite.config.spec import FILE_ONLY, Spec


class ImportSpec(Spec):
    """The settings of `offsite import`."""

    dtype: Annotated[
        Dtype | None,
        Field(description="dtype of the stored weights; left out: the checkpoint's own (bf16 for GGUF)"),
        FILE_ONLY,
    ] = None
    image_size: Annotated[
        int | None,
        Field(ge=1, le=4096, description="ONNX: side length in pixels of the input images"),
        FILE_ONLY,
    ] = None
