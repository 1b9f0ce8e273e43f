"""Trials for a memory budget: the micro-batches of a tuning that need the most memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from offsite.config import TuneSpec
from offsite.data.examples import Example
from offsite.data.pictures.picture_sizes import at_once
from offsite.data_owner.image_task import ImageTask
from offsite.data_owner.text_task import TextTask
from offsite.training.task import Batching

STEPS = 1000  # number of steps of the first epoch that are searched
_LEAST_TOKENS = 256  # least number of tokens at once; fewer are slower and save almost no memory


@dataclass(frozen=True)
class Trial:
    """Micro-batches that run one after the other while memory is measured."""

    task: TextTask | ImageTask
    micro_batches: Sequence[Sequence[int]]  # the rows of each micro-batch
    tokens: int  # tokens of the largest micro-batch, padding included
    longest: int  # tokens of the longest row of the tuning
    at_once: int  # the limit of tokens of a micro-batch in the tuning, if this trial fits


def memory_trials(task: TextTask | ImageTask, spec: TuneSpec, *, steps: int = STEPS) -> Iterator[Trial]:
    """Yields trials with more and more tokens, each about twice the previous one, up to the limit in the settings.

    Args:
        task: the task to train.
        spec: the settings of the tuning: the largest number of tokens at once, the rows of a step, the seed of their
            order.
        steps: for text, the number of steps of the first epoch in which the fullest micro-batches are searched.
    """
    if isinstance(task, TextTask):
        yield from _text_trials(task, spec, steps)
        return
    tokens = task.album.tokens  # the same for every picture
    most, count = min(at_once(tokens, spec.tokens_at_once), spec.length.batch_size, task.rows), 1
    while count < most:
        yield Trial(task, [range(count)], count * tokens, tokens, count * tokens)
        count *= 2
    yield Trial(task, [range(most)], most * tokens, tokens, most * tokens)


def _text_trials(task: TextTask, spec: TuneSpec, steps: int) -> Iterator[Trial]:
    """Yields trials on text with more and more tokens.

    The first trials run the last tokens of the longest row, until the whole row runs. The others run the fullest
    micro-batches of the first `steps` steps, for larger and larger limits of tokens at once.
    """
    longest = max(range(task.rows), key=lambda i: len(task.examples[i].ids))
    width = len(task.examples[longest].ids)
    tokens = _LEAST_TOKENS
    while tokens < width:
        yield Trial(replace(task, examples=(end_of_row(task.examples[longest], tokens),)), [[0]], tokens, width, tokens)
        tokens *= 2
    most = max(spec.tokens_at_once, width)
    first_steps = replace(task, batching=Batching.of(spec)).order(0)[:steps]
    fullest: dict[tuple[tuple[int, ...], ...], int] = {}  # micro-batches -> the highest limit of tokens with these
    tokens = max(_LEAST_TOKENS, width)
    while True:
        batching = replace(task.batching, tokens=min(tokens, most))
        cut = replace(task, batching=batching)
        groups = [*(tuple(group) for step in first_steps for group in cut.micro_batches(step)), (longest,)]
        by_tokens = max(groups, key=partial(_padded, task.examples))
        by_labels = max(groups, key=lambda group: sum(task.examples[i].labels for i in group))
        fullest[tuple(dict.fromkeys((by_tokens, by_labels)))] = batching.tokens
        if tokens >= most:
            break
        tokens *= 2
    for chosen, at_once_tokens in fullest.items():
        yield Trial(task, chosen, _padded(task.examples, chosen[0]), width, at_once_tokens)


def _padded(examples: Sequence[Example], group: Sequence[int]) -> int:
    """The number of tokens of the micro-batch with the rows `group` (indices in `examples`), including padding."""
    return len(group) * max(len(examples[i].ids) for i in group)


def end_of_row(row: Example, tokens: int) -> Example:
    """The last tokens of a row, with their labels."""
    cut = len(row.ids) - tokens
    places = None if row.places is None else row.places[row.places > cut] - cut
    return replace(row, ids=row.ids[cut:], given=max(1, row.given - cut), places=places)


def describe_longest_row(task: TextTask | ImageTask) -> tuple[str, str]:
    """Two texts for an error about too little memory: the name of the longest row, and further advice."""
    if not isinstance(task, TextTask):
        return "one picture", ", or a bundle with fewer trained blocks"
    longest = max(len(example.ids) for example in task.examples)
    return (
        f"its longest row ({longest} tokens)",
        ", or cut the rows: a lower --max-length with --long-rows truncate",
    )
