"""The settings of `offsite plug-in`, and the rules about combinations of these settings."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from offsite.config.setting_types import Chosen, Columns, split_parts
from offsite.config.spec import Spec, rule

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


class PlugInSpec(Spec):
    """The settings of `offsite plug-in`."""

    alternatives = ((("strength",), ("strengths",)),)

    as_: Annotated[
        Literal["adapter", "merged"] | None,
        Field(
            alias="as", description="write an adapter folder or a complete checkpoint; left out: adapter if possible"
        ),
    ] = None
    strength: Annotated[
        float | None,
        Field(
            ge=0, le=1.5, description="interpolate from the base's weights (0) to the returned ones (1); left out: 1"
        ),
    ] = None
    strengths: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1.5)], ...],
        BeforeValidator(split_parts),
        Field(min_length=1, description="strengths to choose from, with --choose-on"),
    ] = STRENGTHS
    checkpoint: Annotated[
        int | None, Field(ge=1, description="which checkpoint of the return, from 1; left out: the last")
    ] = None
    whole: Annotated[
        Path | None,
        Field(
            description="folder of the multi-modal checkpoint that the base was imported from; write all of it, with "
            "its language model replaced"
        ),
    ] = None
    columns: Columns = None
    chosen: Chosen = False
    again: Annotated[bool, Field(description="permit a return that was plugged in before")] = False

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @rule
    def _one_strength_or_several(self) -> None:
        """`strength` is a single value, `strengths` are values to choose from: set one of these two settings."""
        if self.strength is not None and self.strengths != STRENGTHS:
            raise ValueError("strength is a single value, strengths are values to choose from: set only one of the two")

    @rule
    def _whole_is_merged(self) -> None:
        """`whole` writes a complete checkpoint, so it cannot be combined with `as` = adapter."""
        if self.whole is not None and self.as_ == "adapter":
            raise ValueError("whole writes a complete checkpoint, as = adapter does not: give one")

    @rule
    def _some_strength(self) -> None:
        """`strengths` has a value other than 0, which is the base itself."""
        if not any(self.strengths):
            raise ValueError("strengths has no value but 0, which is the base itself")
