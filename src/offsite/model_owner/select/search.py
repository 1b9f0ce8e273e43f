"""Selection by local search: exchanges kept for dropped blocks as long as the emulator's loss on held-out text falls.

If the settings heal, narrow or prune block by block, this is done with each candidate before it is scored. The search
starts from the better of uniform and the best contiguous selection. A move replaces one kept block by a dropped one;
the first move that lowers the loss is made. Scores and the final choice are stored in the scratch folder, so an
interrupted search continues, and healing can resume without a new search.
"""

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch

from offsite.kernels.runtime import resolve_runtime
from offsite.model_owner.block_runner import BlockRunner, LoadedStack
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.calibration.calibration_text import row_form
from offsite.model_owner.emulator_work import work_of
from offsite.model_owner.heal.block_by_block import block_by_block
from offsite.model_owner.heal.middle_states import MiddleStates, middle_states
from offsite.model_owner.narrow.budget_widths import budget_widths
from offsite.model_owner.narrow.even_widths import even_widths
from offsite.model_owner.narrow.removal_errors import removal_errors
from offsite.model_owner.select.contiguous import contiguous
from offsite.model_owner.select.selection_protocol import Selection
from offsite.model_owner.select.uniform import uniform
from offsite.progress import Event, silent
from offsite.storage.files import replace_file

Blocks = tuple[int, ...]
Score = Callable[[Blocks], float]

_SEARCH_TOKENS = 16_384  # maximum number of calibration tokens for healing and scoring a selection
_JUDGED = 8  # one batch in this many is used for scoring, the others for healing


def select(selection: Selection) -> Blocks:
    """The base indices of the best blocks found within the time limit.

    Raises:
        DataError: the calibration text is unreadable or too short.
        StorageError: a file cannot be written.
    """
    spec, middle, scratch = selection.spec, selection.middle, selection.scratch
    chosen = scratch / "chosen.json"
    if chosen.exists():
        return tuple(json.loads(chosen.read_text()))
    deadline = time.monotonic() + 60 * spec.select.search_minutes
    score = _remembered(_judge(selection), scratch / "search.json")
    tried: list[float] = []

    def judged(blocks: Blocks) -> float:
        tried.append(score(blocks))
        selection.progress(Event("searching for blocks", len(tried), None, {"loss": tried[-1], "best": min(tried)}))
        return tried[-1]

    start = min(starts(middle, selection.keep), key=judged)
    best = improve(start, middle, judged, spec.seed, lambda: time.monotonic() < deadline)
    replace_file(chosen, json.dumps(best).encode())
    return best


def starts(middle: Sequence[int], keep: int) -> list[Blocks]:
    """The selections from which the search may start, as base indices.

    They are the uniform one, and all that drop one run of consecutive blocks and keep the middle's first block.
    """
    pieces = [contiguous(middle, keep, middle[0] + before) for before in range(1, keep + 1)]
    return list(dict.fromkeys([uniform(middle, keep), *pieces]))


def improve(start: Blocks, middle: Sequence[int], score: Score, seed: int, goes_on: Callable[[], bool]) -> Blocks:
    """Local search: make moves that lower the score until no move does, or until `goes_on` returns false.

    Args:
        start: base indices of the blocks to start from.
        middle: base indices of the blocks to choose from.
        score: the function to minimise.
        seed: seed of the order in which moves are tried.
        goes_on: called before each move is scored.

    Returns:
        The base indices of the best blocks, whose score is at most that of `start`.
    """
    best, least = start, score(start)
    moved = True
    while moved:
        moved = False
        for candidate in moves(best, middle, seed):
            if not goes_on():
                return best
            found = score(candidate)
            if found < least:
                best, least, moved = candidate, found, True
                break
    return best


def moves(blocks: Blocks, middle: Sequence[int], seed: int) -> Iterator[Blocks]:
    """All selections that differ from `blocks` in one block of `middle`, in an order drawn from the seed."""
    swaps = [tuple(sorted({*blocks, comes} - {goes})) for goes in blocks for comes in middle if comes not in blocks]
    random.Random(f"{seed} {blocks}").shuffle(swaps)  # noqa: S311  no secret
    yield from swaps


def _remembered(score: Score, file: Path) -> Score:
    """The function `score` with a cache of its results in a JSON file."""
    known: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    def remembering(blocks: Blocks) -> float:
        name = " ".join(map(str, blocks))
        if name not in known:
            known[name] = score(blocks)
            replace_file(file, json.dumps(known, indent=1).encode())
        return known[name]

    return remembering


def _judge(selection: Selection) -> Score:
    """A function that scores kept blocks by the emulator's mean cross-entropy on held-out batches, in nats per token.

    If the settings heal, narrow or prune block by block, this is done with the emulator before it is scored.
    """
    model, sandwich, spec, scratch = selection.model, selection.sandwich, selection.spec, selection.scratch
    machine = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    tokens = min(spec.calibration.tokens, _SEARCH_TOKENS)
    batches = calibration_batches(model, spec.calibration.source, tokens, row_form(spec))
    held_out = batches[_JUDGED - 1 :: _JUDGED] or batches[-1:]
    fitted = [ids for ids in batches if not any(ids is one for one in held_out)] or batches
    states = middle_states(
        model, sandwich, held_out, machine, scratch / "judged", selection.progress, "hidden states to search with"
    )
    runner = BlockRunner(model, machine)
    solves = work_of(sandwich.middle, spec).block_by_block
    errors = (
        removal_errors(model, sandwich.middle, spec, selection.progress, batches=fitted) if spec.shares_budget else None
    )

    @torch.no_grad()
    def score(blocks: Blocks) -> float:
        folder = scratch / "candidate"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        widths = even_widths(model, blocks, spec) if spec.narrows else None
        if errors is not None:
            widths = budget_widths(model, blocks, errors, spec)
        healed = (
            block_by_block(model, sandwich, blocks, spec, folder, silent, widths=widths, batches=fitted).tensors
            if solves
            else {}
        )
        stack = runner.stack(blocks, sandwich.top, healed, whole=True)
        return fmean(_nats(stack, states, position) for position in range(len(held_out)))

    return score


def _nats(stack: LoadedStack, states: MiddleStates, position: int) -> float:
    """The emulator's mean cross-entropy on the batch with index `position`, in nats per token."""
    ids, enters, _ = states.at(position)
    return float(stack.to_the_end(ids, enters)[1])
