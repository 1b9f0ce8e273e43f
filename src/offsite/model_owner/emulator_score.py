"""The losses of an emulator and its base on the same text, as the owner's ledger keeps them. Torch-free."""

from dataclasses import dataclass


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
