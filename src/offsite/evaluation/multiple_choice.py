"""Multiple choice by likelihood: the model's answer is the choice with the highest likelihood after the question.

The two metrics come from lm-evaluation-harness (0.4.13, `ConfigurableTask.process_results`) and give the same results.
For `acc` the model's answer is the choice with the highest summed log-likelihood. For `acc_norm` each sum is first
divided by the choice's length in characters, as the choice is written in the data, without the space that joins it to
the prompt (the harness's paper says bytes, but its code counts characters, see its issue 3278). Of equal choices the
first one is the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offsite.data.examples import Choices
from offsite.evaluation.row_losses import row_losses
from offsite.models.backbone import Network
from offsite.progress import Progress, silent


@dataclass(frozen=True)
class ChoiceScore:
    """The log-likelihoods of one question's choices, in nats, and the index of the right choice."""

    line: int  # line of the question in its file, from 1
    log_likelihoods: tuple[float, ...]
    lengths: tuple[int, ...]  # number of characters of each choice
    answer: int  # index of the right choice
    file: Path | None = None  # the file of the line

    @property
    def right(self) -> bool:
        """Whether the right choice has the highest log-likelihood (metric `acc`)."""
        return _likeliest(self.log_likelihoods) == self.answer

    @property
    def right_by_length(self) -> bool:
        """Whether the right choice has the highest log-likelihood per character (metric `acc_norm`)."""
        by_length = [total / size for total, size in zip(self.log_likelihoods, self.lengths, strict=True)]
        return _likeliest(by_length) == self.answer


def score_choices(
    network: Network, questions: Sequence[Choices], budget: int, progress: Progress = silent
) -> list[ChoiceScore]:
    """Compute the log-likelihood of every choice of every question.

    Args:
        network: backbone and head, in eval mode.
        questions: the questions, from `encode_choices`.
        budget: the largest number of tokens (padding included) that run at the same time.
        progress: receives the progress events.
    """
    examples = [example for question in questions for example in question.examples]
    nats = iter(row_losses(network, examples, budget, progress, "scoring choices"))
    return [
        ChoiceScore(
            question.line,
            tuple(-next(nats).nats for _ in question.examples),
            question.lengths,
            question.answer,
            question.examples[0].file,
        )
        for question in questions
    ]


def _likeliest(scores: Sequence[float]) -> int:
    """The index of the highest score; of equal scores the first."""
    return max(range(len(scores)), key=scores.__getitem__)
