"""The losses of an emulator and its base on the same text, as the owner's ledger keeps them. Torch-free."""

import json
from dataclasses import asdict, dataclass
from typing import Self


@dataclass(frozen=True)
class EmulatorScore:
    """The losses of base and emulator on the same text, in nats per token, and their difference with its interval."""

    base_loss: float
    emulator_loss: float
    low: float | None  # ends of the 95 % interval of emulator minus base, over sequences; None for a single sequence
    high: float | None
    tokens: int  # number of tokens that were predicted
    fitted: bool  # whether packing was fitted on this text too, so that the emulator's loss flatters it
    text: str  # what the text is, for people

    @property
    def gap(self) -> float:
        """The emulator's loss minus the base's."""
        return self.emulator_loss - self.base_loss

    def to_json(self) -> str:
        """The score as a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the score from the JSON of `to_json`.

        Raises:
            ValueError: the JSON is malformed.
        """
        try:
            return cls(**json.loads(text))
        except TypeError as problem:
            raise ValueError(f"its emulator's score is malformed: {problem}") from None
