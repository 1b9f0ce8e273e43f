"""Caches the output of the frozen first blocks, which for the same row is the same in every epoch.

If the data owner trains only the last blocks, most of a bundle's forward pass depends only on the rows of the data set.
Its result, the hidden states that enter the first trained block, is written to a file in the run's folder. A batch
whose rows are all in the file skips the frozen blocks; any other batch (validation) runs all blocks.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offsite.config import TuneSpec
from offsite.data.batches import Batch, collate, micro_batches
from offsite.data_owner.feature_file import TOKENS_AT_ONCE, FeatureFile, describe_bytes
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning
from offsite.errors import IncompatibleError, StorageError
from offsite.kernels import Piece
from offsite.models.blocks import Wrapped, unwrapped_block
from offsite.progress import Event, Progress
from offsite.storage.files import replace_file, storage_errors
from offsite.storage.leftovers import delete_command
from offsite.storage.strict_json import strict_json
from offsite.training.label_losses import label_losses
from offsite.training.schedule import step_count

_NAME = "frozen blocks run once for all epochs"  # name in the report of the kernels
_OTHER_FILES = 28  # disk space of two resume points and the return, in bytes for each trained parameter
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # accepted difference in the loss of a labelled token


@contextlib.contextmanager
def cached_features(tuning: Tuning, spec: TuneSpec, folder: Path, progress: Progress) -> Iterator[Piece]:
    """Context manager: in its body, the frozen blocks before the first trained block run only once for each row.

    Nothing is cached if each row runs only once, if the disk is too full, or if a later block needs more than the
    hidden state from earlier blocks. The decision is saved with the run, so a resumed run makes the same one.

    Args:
        tuning: the tuning; its frozen first blocks are wrapped, and unwrapped at the end.
        spec: the settings of the tuning.
        folder: the run's folder, in which the cache file is written.
        progress: receives the progress events.

    Yields:
        An entry for the report of the kernels: the number of skipped blocks, or the reason why none is skipped.

    Raises:
        StorageError: a file cannot be written or read.
    """
    why_not = _nothing_to_cache(tuning, spec)
    if why_not:
        yield Piece(_NAME, 0, why_not)
        return
    blocks = dict(tuning.blocks.named_children())
    before = _frozen_before(tuning)
    features = FeatureFile(_text(tuning).examples)
    frozen = dict(list(blocks.items())[:before])
    first = list(blocks.values())[before]
    for name, block in frozen.items():
        tuning.blocks.register_module(name, _Skipped(block, features))
    try:
        with contextlib.ExitStack() as opened:
            why_not = _why_not_cached(tuning, first, features, folder, progress)
            if not why_not:
                file = folder / "features.bin"
                features.write(file, lambda batch: _states_entering(tuning, first, batch), progress)
                with storage_errors(file):
                    opened.enter_context(features.open(file))
                network = _text(tuning).network
                load = partial(features.load_batch, device=tuning.task.device)
                network.before_pass.append(load)
                opened.callback(network.before_pass.remove, load)
            yield Piece(_NAME, 0 if why_not else before, why_not or "they are the same in every epoch")
    finally:
        for name, block in frozen.items():
            tuning.blocks.register_module(name, block)


def _frozen_before(tuning: Tuning) -> int:
    """The number of blocks before the first trained block."""
    trained = {id(block) for block in tuning.trained}
    return next(i for i, block in enumerate(tuning.blocks.children()) if id(unwrapped_block(block)) in trained)


def _nothing_to_cache(tuning: Tuning, spec: TuneSpec) -> str:
    """The reason why a cache of the frozen blocks' output would not help; empty if it may help."""
    if tuning.processes.count > 1:
        return "several processes would each have to run every row"
    if not isinstance(tuning.task, TextTask):
        return "pictures are cropped differently in every epoch"
    if spec.memory.cache_features == "off":
        return "switched off by cache_features"
    if not _frozen_before(tuning):
        return "the first block trains"
    rows = tuning.task.rows
    once = step_count(spec, rows) <= math.ceil(rows / spec.length.batch_size)
    return "each row runs once" if once else ""


def _text(tuning: Tuning) -> TextTask:
    """The task of a tuning on text.

    Raises:
        TypeError: the tuning is on pictures.
    """
    if not isinstance(tuning.task, TextTask):
        raise TypeError("features of something else than text were asked for")
    return tuning.task


class _Skipped(Wrapped):
    """A frozen block that is skipped if the hidden states that enter the first trained block are cached.

    It then returns these states.
    """

    def __init__(self, block: nn.Module, features: FeatureFile) -> None:
        super().__init__(block)
        self._features = features
        self._others: int | None = None  # number of outputs after the hidden state; None if the output is no tuple

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        """Return the cached states in the form of the block's own result, or run the block if there are none."""
        states = self._features.states
        if states is not None:
            return states if self._others is None else (states, *(None for _ in range(self._others)))
        output = self.block(*arguments, **settings)
        self._others = len(output) - 1 if isinstance(output, tuple) else None
        return output


class _Reached(Exception):  # noqa: N818  a signal that stops the forward pass
    """Raised to stop a forward pass at the first trained block; holds the hidden states that enter it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@torch.no_grad()
def _states_entering(tuning: Tuning, first: nn.Module, batch: Batch) -> Tensor:
    """Run the frozen blocks; returns the hidden states that enter `first`, the first trained block: (B, T, H).

    Raises:
        IncompatibleError: the model does not call its blocks with the hidden state.
    """

    def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _Reached(arguments[0])

    handle = first.register_forward_pre_hook(stop)
    try:
        label_losses(_text(tuning).network, batch)
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise IncompatibleError(
        f"{type(_text(tuning).network.body).__name__} does not call its blocks with the hidden state",
        next_step="ask the model's owner for another bundle, and send this message along; nothing in a signed bundle "
        "can be corrected",
    )


def _why_not_cached(tuning: Tuning, first: nn.Module, features: FeatureFile, folder: Path, progress: Progress) -> str:
    """The reason why features are not cached, as decided when the run began; empty if they are cached.

    Also sets the width and dtype of `features`. `first` is the first trained block, `folder` the run's folder.
    """
    record = folder / "features.json"
    decided = _read_decision(record) if record.exists() else None
    if decided is False:
        return "decided when the run began"
    agree = _agree(tuning, first, features, tuning.task.order(0)[0])
    if decided:
        return ""
    trained = sum(map(torch.numel, tuning.weights.masters.values()))
    with storage_errors(folder):
        free = shutil.disk_usage(folder).free - _OTHER_FILES * trained
    why_not = "" if agree else "what later blocks need is more than a hidden state"
    if agree and features.size > free:
        why_not = f"caching takes {describe_bytes(features.size)} of disk"
    if why_not:
        progress(Event(f"frozen blocks run in every epoch: {why_not}", 0))
    replace_file(record, json.dumps({"cached": not why_not}).encode(), mode=0o600)
    return why_not


def _read_decision(record: Path) -> bool:
    """Whether the run caches features, from the file in which this was saved when the run began.

    Raises:
        StorageError: the file is damaged.
    """
    try:
        content = strict_json(record.read_bytes())
        if content in ({"cached": True}, {"cached": False}):
            return bool(content["cached"])
        problem = "it does not say whether features are cached"
    except (OSError, ValueError) as error:
        problem = str(error)
    raise StorageError(
        f"cannot read {record}",
        reasons=[problem],
        next_step=f"remove the run and start again: {delete_command([record.parent])}",
    )


@torch.no_grad()
def _agree(tuning: Tuning, first: nn.Module, features: FeatureFile, rows: Sequence[int]) -> bool:
    """Whether some rows have the same loss when the frozen blocks are skipped and when they run.

    Also sets the width and dtype of `features`. `first` is the first trained block, `rows` are indices of rows.
    """
    for block in tuning.trained:
        block.eval()
    group = next(micro_batches(_text(tuning).examples, rows, TOKENS_AT_ONCE))
    batch = collate([_text(tuning).examples[i] for i in group])
    expected = label_losses(_text(tuning).network, batch)[1]
    states = _states_entering(tuning, first, batch)
    features.width, features.dtype = states.shape[-1], states.dtype
    mask = torch.from_numpy(batch.mask).to(states.device, torch.bool)
    try:
        features.states = states.masked_fill(~mask[..., None], 0)  # the file has no states of padding; it reads zeros
        found = label_losses(_text(tuning).network, batch)[1]
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):  # it needs the blocks' other outputs
        return False
    finally:
        features.states = None
    tolerance = _TOLERANCE.get(states.dtype, 2e-2)
    return bool(torch.allclose(expected, found, rtol=tolerance, atol=tolerance))
