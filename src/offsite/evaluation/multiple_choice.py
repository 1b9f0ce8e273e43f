"""Multiple choice by likelihood: the model's answer is the choice with the highest likelihood after the question.

Both rules come from lm-evaluation-harness (0.4.13, `ConfigurableTask.process_results`) and give the same results.
`acc` takes the choice with the highest summed log-likelihood. `acc_norm` first divides this sum by the choice's length
in characters, as the choice is written in the data, without the space that joins it to the prompt (the harness's paper
says bytes, but its code counts characters, see its issue 3278). If choices are equal, the first one is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from offsite.data.examples import Choices
from offsite.evaluation.row_losses import row_losses
from offsite.models.backbone import Network
from offsite.progress import Progress, silent


@dataclass(frozen=True)
class ChoiceScore:
    """The log-likelihoods of one question's choices, in nats, and the index of the right one."""

    line: int
    log_likelihoods: tuple[float, ...]
    lengths: tuple[int, ...]  # characters of each choice
    answer: int

    @property
    def right(self) -> bool:
        """Whether the right choice has the highest log-likelihood."""
        return _likeliest(self.log_likelihoods) == self.answer

    @property
    def right_by_length(self) -> bool:
        """Whether the right choice has the highest log-likelihood per character."""
        by_length = [total / size for total, size in zip(self.log_likelihoods, self.lengths, strict=True)]
        return _likeliest(by_length) == self.answer


def score_choices(
    network: Network, questions: Sequence[Choices], budget: int, progress: Progress = silent
) -> list[ChoiceScore]:
    """Score every choice of every question.

    Args:
        network: backbone and head, in eval mode.
        questions: from `encode_choices`.
        budget: padded tokens that run at the same time.
        progress: called with the progress events.
    """
    examples = [example for question in questions for example in question.examples]
    nats = iter(row_losses(network, examples, budget, progress, "scoring choices"))
    return [
        ChoiceScore(
            question.line, tuple(-next(nats).nats for _ in question.examples), question.lengths, question.answer
        )
        for question in questions
    ]


def _likeliest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
